"""What a decoder learns from: sampled latents, and a share of encoded images among them."""

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset


class LatentMix(Dataset):
    """`num_sampled` items {"latents": [C, H, W]} from `sampled`, then `num_real` from `real`, which is repeated where
    it has fewer."""

    def __init__(self, sampled: Sequence, num_sampled: int, real: Sequence, num_real: int):
        self.sampled, self.num_sampled, self.real, self.num_real = sampled, num_sampled, real, num_real

    def __len__(self) -> int:
        return self.num_sampled + self.num_real

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i < self.num_sampled:
            return {"latents": self.sampled[i]["latents"]}
        return {"latents": self.real[(i - self.num_sampled) % len(self.real)]["latents"]}
