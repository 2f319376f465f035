"""The device that is not there, for a test or for a whole module."""

import pytest

from tests.cuda_dry_run.device import cuda_dry_run


@pytest.fixture
def gpu():
    """The mode of a device that is not there while the test runs."""
    with cuda_dry_run() as mode:
        yield mode
