"""Networks that see whole videos, whose features Fréchet video distances are defined on; checkpoints are the user's.

Axes: B videos, F frames, H and W pixels, D features. A video is uint8 [F, H, W, 3].
"""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import VideoMAEImageProcessor, VideoMAEModel

from slimstep.engine.files import digest
from slimstep.engine.quiet import one_line, quiet

I3D = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"
FEWEST_FRAMES = 10  # its strides and pools over time, each by 2, leave nothing of 8; public code asks for 10
AT_ONCE = 8  # videos per forward pass


class VideoFeatures(ABC):
    """Videos uint8 [B, F, H, W, 3] to features float32 [B, D]."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What makes distances of its features comparable."""

    @abstractmethod
    def forward(self, videos_BFHW3: Tensor) -> Tensor: ...

    @torch.inference_mode()
    def __call__(self, videos_BFHW3: Tensor) -> Tensor:
        assert videos_BFHW3.dtype == torch.uint8, f"videos are {videos_BFHW3.dtype}, not uint8"
        return torch.cat([self.forward(videos) for videos in videos_BFHW3.split(AT_ONCE)])


class VideoMAE(VideoFeatures):
    """The mean over all tokens of VideoMAE's last layer (Tong et al. 2022), from a folder of transformers'.

    It takes a fixed number of frames, 16: as many are taken equally far apart, some twice where a video has fewer.
    """

    def __init__(self, folder: str, device: str | torch.device = "cpu") -> None:
        """Raises ValueError for a folder that holds no VideoMAE with its weights and preprocessing."""
        self.folder, self.device = Path(folder), torch.device(device)
        try:
            with quiet():
                self.model, loading = VideoMAEModel.from_pretrained(folder, output_loading_info=True)
                self.processor = VideoMAEImageProcessor.from_pretrained(folder)
        except Exception as error:  # readers of damaged files raise whatever they stumble over
            way = "give a folder with config.json, model.safetensors and preprocessor_config.json"
            raise ValueError(f"VideoMAE: {folder} cannot be read: {one_line(error)[:160]}; {way}") from error
        if absent := sorted(loading["missing_keys"]):
            raise ValueError(f"VideoMAE: {folder} is no VideoMAE with its weights: {absent[0]} … are absent")
        self.model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def name(self) -> str:
        weights = [digest(path)[:12] for path in sorted(self.folder.glob("*.safetensors"))]
        return f"VideoMAE {self.folder.name} {' '.join(weights)}, {self.model.config.num_frames} frames, mean of tokens"

    def forward(self, videos_BFHW3: Tensor) -> Tensor:
        at = torch.linspace(0, videos_BFHW3.shape[1] - 1, self.model.config.num_frames).round().long()
        frames = videos_BFHW3[:, at].permute(0, 1, 4, 2, 3).cpu()
        pixels = self.processor([list(video) for video in frames], return_tensors="pt")["pixel_values"]
        return self.model(pixels.to(self.device)).last_hidden_state.mean(1).float()


class I3DFeatures(VideoFeatures):
    """The 400 features before the softmax of I3D trained on Kinetics-400, as TorchScript: StyleGAN-V's file, which
    repeats the published FVD's network, resizing and scaling included."""

    def __init__(self, file: str, device: str | torch.device = "cpu") -> None:
        """Raises ValueError for a file that is no TorchScript module."""
        self.file, self.device = Path(file), torch.device(device)
        if not self.file.is_file():
            raise ValueError(f"I3D: {file} does not exist; bring {I3D} here")
        try:
            self.model = torch.jit.load(file, map_location=self.device).eval()
        except RuntimeError as error:
            raise ValueError(f"I3D: {file} is no TorchScript ({one_line(error)[:160]}); bring {I3D} here") from error

    @cached_property
    def name(self) -> str:
        return f"I3D {digest(self.file)[:12]}"

    def forward(self, videos_BFHW3: Tensor) -> Tensor:
        if (count := videos_BFHW3.shape[1]) < FEWEST_FRAMES:
            raise ValueError(f"I3D takes {FEWEST_FRAMES} frames or more, and these videos have {count}: use VideoMAE")
        x_B3FHW = videos_BFHW3.permute(0, 4, 1, 2, 3).to(self.device).float()
        return self.model(x_B3FHW, rescale=True, resize=True, return_features=True).flatten(1).float()
