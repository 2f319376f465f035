"""The features that FID and KID are defined on: InceptionV3 as torch-fidelity ported it from TensorFlow.

Axes: B images, H and W pixels.
"""

import pickle
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from slimstep.engine.files import digest

RELEASE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
ADDRESS = f"{RELEASE}/weights-inception-2015-12-05-6726825d.pth"
LAYER = "2048"


class Inception:
    """The 2048 features before InceptionV3's last layer; `file` holds the weights, which are never downloaded."""

    def __init__(self, file: str | Path, device: str | torch.device = "cpu") -> None:
        """Raises ValueError where torch-fidelity is not installed, or `file` is not its InceptionV3."""
        self.file, self.device = Path(file), torch.device(device)
        if find_spec("torch_fidelity") is None:
            raise ValueError(f"evaluation.inception={file} needs torch-fidelity: pip install torch-fidelity")
        if not self.file.is_file():
            raise ValueError(f"evaluation.inception={file} does not exist; bring {ADDRESS} here")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            torch.load(file, weights_only=True)  # torch-fidelity reads pickles that run code: not before this did
            self.model = FeatureExtractorInceptionV3("inception-v3", [LAYER], str(file)).to(device)
        except (RuntimeError, OSError, EOFError, TypeError, pickle.UnpicklingError) as error:
            message = f"({type(error).__name__}); bring {ADDRESS} here"
            raise ValueError(f"evaluation.inception={file} does not hold InceptionV3's weights {message}") from error

    @cached_property
    def weights(self) -> str:
        """12 hex digits of the file's SHA-256."""
        return digest(self.file)[:12]

    @torch.inference_mode()
    def __call__(self, images_B3HW: Tensor) -> Tensor:
        """Features, float32 [B, 2048], of uint8 images of any size; they are resized to 299 as TensorFlow did."""
        assert images_B3HW.dtype == torch.uint8, f"images are {images_B3HW.dtype}, not uint8"
        (features,) = self.model(images_B3HW.to(self.device))
        return features.float()
