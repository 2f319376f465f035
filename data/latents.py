"""What a decoder learns from: sampled latents, and a share of encoded images among them."""

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset


class LatentMix(Dataset):
    """`count` items {"latents": [C, H, W]}: a share `real_share` is taken from `real`, the rest from `sampled`.

    Where a part has fewer than asked for it is repeated from its beginning.
    """

    def __init__(self, sampled: Sequence | None, real: Sequence | None, count: int, real_share: float):
        self.sampled, self.real = sampled, real
        self.num_real = round(count * real_share)
        self.num_sampled = count - self.num_real

    def __len__(self) -> int:
        return self.num_sampled + self.num_real

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        part, place = (self.sampled, i) if i < self.num_sampled else (self.real, i - self.num_sampled)
        return {"latents": part[place % len(part)]["latents"]}
