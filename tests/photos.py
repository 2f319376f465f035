"""The fixture `photo_folder`: real captioned photographs, made once per session."""

import pytest

from scripts.make_photo_folder import make_photo_folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """More than 300 captioned crops of real photographs, 128 px, as images/*.jpg and metadata.jsonl."""
    pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("photos")
    make_photo_folder(folder, size=128)
    return folder
