"""Self-attentions that merge tokens: ToMe for Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604).

Of every 2×2 cell of the picture one token, the upper left one, is a destination. Each of the others is matched with the
destination that is most like it (cosine), and those of the best matches, a share of all tokens, are merged into theirs:
the attention gets the mean of what came together, counted as often as it stands for (log of the number on its keys:
Bolya et al. 2023, arXiv 2210.09461, equation 1), and every token takes its destination's output. So tokens that are
equal can be merged without a change. Which tokens are destinations is no matter of chance, and each sample has matches
of its own: neither batches nor processes change them.

The likeness is that of the attention's inputs, behind the norm. This file travels with exports, in the class file of
their network.

Axes: B batch, L tokens, M tokens after merging, S those that can be merged, D destinations, C channels.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F


def merged_places(x_BLC: Tensor, grid: tuple[int, int], share: float) -> tuple[Tensor, int]:
    """[B, L], the row of each token among the M that are left, and M. grid: the picture's height and width in tokens.

    At most the tokens that are no destination are merged, three of four where both sides are even.
    """
    height, width = grid
    destinations = (height // 2) * (width // 2)
    sources = height * width - destinations
    merged = min(int(share * height * width), sources) if destinations else 0
    order_L = destinations_last(height, width, x_BLC.device)
    rows = torch.arange(height * width - merged, device=x_BLC.device)
    batch, stay = len(x_BLC), sources - merged
    if not destinations:
        return rows.expand(batch, -1), len(rows)
    unit_BLC = F.normalize(x_BLC, dim=-1)[:, order_L]
    likeness_BSD = unit_BLC[:, :sources] @ unit_BLC[:, sources:].mT
    best_BS, match_BS = likeness_BSD.max(-1)
    best_first_BS = best_BS.argsort(dim=-1, descending=True, stable=True)
    own_BS = rows[:stay].expand(batch, -1)
    into_BS = stay + match_BS.gather(1, best_first_BS[:, :merged])
    row_BS = torch.empty_like(match_BS).scatter_(1, best_first_BS, torch.cat([into_BS, own_BS], 1))
    row_BL = torch.cat([row_BS, rows[stay:].expand(batch, -1)], 1)
    return torch.empty_like(row_BL).scatter_(1, order_L.expand(batch, -1), row_BL), len(rows)


def destinations_last(height: int, width: int, device: torch.device) -> Tensor:
    """All tokens of a picture, those behind that others are merged into."""
    grid_HW = torch.arange(height * width, device=device).view(height, width)
    even_height, even_width = height // 2 * 2, width // 2 * 2
    upper_HW, lower_HW, last_row = grid_HW[:even_height:2], grid_HW[1::2], grid_HW[even_height:]
    upper_left, upper_right, last_column = upper_HW[:, :even_width:2], upper_HW[:, 1::2], upper_HW[:, even_width:]
    return torch.cat([part.flatten() for part in (lower_HW, upper_right, last_column, last_row, upper_left)])


class MergedAttention(Attention):
    """A self-attention over a share of the tokens fewer. `grid` is set by what holds it whenever that runs."""

    share: float
    grid: tuple[int, int]

    def forward(self, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, **kwargs) -> Tensor:
        if attention_mask is not None:
            raise ValueError("a self-attention that merges tokens takes no attention mask; leave one of them out")
        place_BL, count = merged_places(hidden_states.detach(), self.grid, self.share)
        sizes_BM = hidden_states.new_zeros(len(place_BL), count, dtype=torch.float32)
        sizes_BM = sizes_BM.scatter_add(1, place_BL, torch.ones_like(place_BL, dtype=torch.float32))
        # In float32: half a thousand equal numbers cannot be added in bfloat16.
        place_BLC = place_BL[..., None].expand(-1, -1, hidden_states.shape[-1])
        sums_BMC = hidden_states.new_zeros(*sizes_BM.shape, hidden_states.shape[-1], dtype=torch.float32)
        mean_BMC = sums_BMC.scatter_add(1, place_BLC, hidden_states.float()) / sizes_BM[..., None]
        counted_B1M = sizes_BM.log()[:, None].to(hidden_states.dtype)
        output_BMC = super().forward(mean_BMC.to(hidden_states.dtype), attention_mask=counted_B1M, **kwargs)
        return output_BMC.gather(1, place_BL[..., None].expand(-1, -1, output_BMC.shape[-1]))


def merge_tokens(attentions: Iterable[Attention], share: float) -> None:
    """Makes self-attentions merge a share of their tokens, in place."""
    for attention in attentions:
        attention.__class__, attention.share = MergedAttention, share


@contextmanager
def merging(attentions: Iterable[Attention], share: float) -> Iterator[None]:
    """While this runs the attentions merge a share of their tokens; afterwards they are as they were."""
    before = [(attention, type(attention), getattr(attention, "share", None)) for attention in attentions]
    merge_tokens([attention for attention, _, _ in before], share)
    try:
        yield
    finally:
        for attention, kind, own in before:
            attention.__class__, attention.share = kind, own
            if own is None:
                del attention.share
                attention.__dict__.pop("grid", None)
