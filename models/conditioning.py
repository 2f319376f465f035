"""What a batch is conditioned on beside latents and timesteps: named tensors, one row for each sample.

    "text"        text states [B, L, E]
    "text_mask"   which of them are the caption's [B, L], 1 or 0, where the network asks
    "pooled"      SDXL's pooled text state [B, P]
    "time_ids"    SDXL's original size, crop and target size [B, 6]
    "upscaled"    the picture of the stage before, at the size of this one, and noised [B, 3, H, W]
    "noise_level" the timestep that says how much [B]
    "first_frame" latents of a video's first frame [B, C, h, w], as CogVideoX is given them

Those of Stable Video Diffusion are in families/svd/conditions.py.
An unconditional model has none of them. Under these names the latent cache keeps the tensors and the training loop's
batches carry them; which argument of a network each becomes, its denoiser knows (models/denoiser.py).

Axes: B batch, L tokens, T tokens of all captions that their masks have, E text width, P pooled width.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

log = logging.getLogger("slimstep")
TEXT, TEXT_MASK = "text", "text_mask"
OF_PICTURES = ("upscaled", "noise_level", "first_frame")  # what no caption says, so that the empty one has it, too


@dataclass(frozen=True)
class Conditioning:
    """Named tensors, batch first. Without any it is that of an unconditional model, and any number of rows."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Rows; 0 where there are no tensors."""
        return len(next(iter(self.tensors.values()), ()))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning({name: function(tensor) for name, tensor in self.tensors.items()})

    def rows(self, index: Sequence[int] | slice | Tensor) -> "Conditioning":
        """These rows in that order; an index may come more than once."""
        index = index if isinstance(index, (slice, Tensor)) else list(index)
        return self.map(lambda tensor: tensor[index])

    def expand(self, rows: int) -> "Conditioning":
        """A conditioning of one row as so many, without a copy."""
        return self.map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Conditioning":
        """On the device, and, where its numbers are not whole ones, in the dtype."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def where(self, keep_B: Tensor, other: "Conditioning") -> "Conditioning":
        """Own rows where `keep_B`, else those of `other`, which has as many or one: dropped captions. What is of
        pictures stays."""
        self.without_pictures._check(other)

        def chosen(name: str) -> Tensor:
            own = self.tensors[name]
            return torch.where(keep_B.view(-1, *[1] * (own.ndim - 1)), own, other.tensors[name])

        return Conditioning({**self.tensors, **{name: chosen(name) for name in other.tensors}})

    @property
    def without_pictures(self) -> "Conditioning":
        return Conditioning({name: tensor for name, tensor in self.tensors.items() if name not in OF_PICTURES})

    def emptied(self, uncond: "Conditioning") -> "Conditioning":
        """As many rows of what guidance steers away from: `uncond`, of one row, beside what is of pictures."""
        self.without_pictures._check(uncond)
        return Conditioning({**self.tensors, **uncond.expand(len(self)).tensors})

    @staticmethod
    def cat(*parts: "Conditioning") -> "Conditioning":
        """The rows of all parts, in that order."""
        for part in parts[1:]:
            parts[0]._check(part)
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def _check(self, other: "Conditioning") -> None:
        assert self.tensors.keys() == other.tensors.keys(), f"{[*self.tensors]} beside {[*other.tensors]}"


def used_tokens(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the text states [T, E] that the mask has, caption after caption; without a mask as they are."""
    if TEXT_MASK not in tensors:
        return dict(tensors)
    return {**tensors, TEXT: tensors[TEXT][tensors[TEXT_MASK] > 0]}


def all_tokens(used_TE: Tensor, mask_L: Tensor) -> Tensor:
    """[L, E]: the text states of one caption, whose mask has T tokens, each in its place, and zeros in the others."""
    text_LE = used_TE.new_zeros(len(mask_L), used_TE.shape[1])
    text_LE[mask_L > 0] = used_TE
    return text_LE


def conditioning_of(batch: Mapping[str, Tensor], like: Conditioning) -> Conditioning:
    """What a batch of the training loop is conditioned on: its tensors under the names that `like` has, and what is of
    pictures, of which an empty caption says nothing."""
    names = [*like.tensors, *(name for name in OF_PICTURES if name in batch)]
    return Conditioning({name: batch[name] for name in names})


@functools.cache
def cleans_captions() -> bool:
    """Whether captions lose their markup and addresses before T5 reads them: as in the calls of the stock pipelines,
    where the packages for it are there. Without these the stock pipelines say so for every caption."""
    packages = {"beautifulsoup4": is_bs4_available(), "ftfy": is_ftfy_available()}
    if missing := [name for name, is_there in packages.items() if not is_there]:
        log.info(f"captions are encoded as they stand; with {' and '.join(missing)} installed they are cleaned first")
    return not missing
