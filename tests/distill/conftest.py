"""The worlds that tests of few steps share."""

import pytest

from tests.distill.few_steps import World
from tests.tiny import slow


@pytest.fixture(scope="module", params=["UNet", "SD3", *slow("FLUX", "Sana", "Qwen-Image")])
def world(request):
    return World(request.param)


@pytest.fixture(scope="module")
def unet():
    return World("UNet")
