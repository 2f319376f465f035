"""What prunes: the search for a UNet, the pruned decoder."""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

import slimstep.eval.config
from slimstep.engine.checks import check_choice, check_minimum
from slimstep.engine.config import StageConfig
from slimstep.models.architecture import DTYPES, MOST_MERGED

MOST_ROUNDS = 200
LEAST_SETS = 12
ACTIONS = ("remove", "narrow", "quantize", "merge", "copy")
MEASURED = ("narrow", "quantize", "merge")  # beside removals: each change is scored and timed by itself
NORM_GROUPS = ("whole", "per_group")
BY_ACTIVATIONS = ("taylor", "activation_energy")
IMPORTANCE = ("magnitude", *BY_ACTIVATIONS, "random", "first")


@dataclass
class SearchConfig:
    """How an architecture is chosen. `blocks`: whole ones, or the attentions and feed-forwards of transformer blocks,
    too. `actions` are what may happen to a block: remove, narrow (its parts to shares of their `widths`), quantize (its
    linear layers to one of `dtypes`, int8 and fp8), merge (shares of its tokens, in the self-attentions of UNets: one
    of the shares `merge`) and copy; blocks that a pattern of `keep` names stay as they are. `target_ms` wins over
    `target_fraction`, a share of the teacher's UNet latency; blocks are ranked by `metric`, CLIP score or a per-image
    one of `metrics`. `interactions` is the number of random sets of changes in which pairs are sought that lose more,
    or less, than the sum, 0 for none; `interactions_by` what the sets are measured by: screen, the error of one
    prediction, or images."""

    method: Any = None
    blocks: str = "whole"
    actions: list[str] = field(default_factory=lambda: ["remove", "copy"])
    widths: list[float] = field(default_factory=lambda: [0.75, 0.5, 0.25])
    dtypes: list[str] = field(default_factory=lambda: ["int8"])
    merge: list[float] = field(default_factory=lambda: [0.25, 0.5])
    keep: list[str] = field(default_factory=list)
    target_fraction: float | None = 0.75
    target_ms: float | None = None
    rounds: int = 2
    metric: str = "clip"
    interactions: int = 0
    interactions_by: str = "screen"
    skip_rule: Any = "shortcut"
    copy_init: str = "zero"

    def __post_init__(self) -> None:
        check_minimum("search", self, 1, "rounds")
        if self.rounds > MOST_ROUNDS:
            raise ValueError(f"search.rounds={self.rounds} is more than {MOST_ROUNDS}: no UNet has so many blocks")
        if not isinstance(self.skip_rule, (str, dict)) and not OmegaConf.is_dict(self.skip_rule):
            raise ValueError(f"search.skip_rule={self.skip_rule} must be shortcut, drop_skip or {{block: rule}}")
        check_choice("search", self, copy_init=("zero", "same"), blocks=("whole", "sublayers"))
        check_choice("search", self, interactions_by=("screen", "images"))
        if self.interactions and self.interactions < LEAST_SETS:
            few = f"must be 0 or at least {LEAST_SETS}: pairs are not seen in fewer sets"
            raise ValueError(f"search.interactions={self.interactions} {few}")
        unknown = sorted(set(self.actions) - set(ACTIONS))
        if unknown or not {"remove", *MEASURED} & set(self.actions):
            wrong = f", and not {unknown}" if unknown else ""
            raise ValueError(f"search.actions={list(self.actions)} must name another than copy, of {ACTIONS}{wrong}")
        if not all(0 < share < 1 for share in self.widths) or "narrow" in self.actions and not self.widths:
            raise ValueError(f"search.widths={list(self.widths)} must be shares between 0 and 1")
        if set(self.dtypes) - set(DTYPES) or "quantize" in self.actions and not self.dtypes:
            raise ValueError(f"search.dtypes={list(self.dtypes)} must be some of {DTYPES}")
        if not all(0 < share <= MOST_MERGED for share in self.merge) or "merge" in self.actions and not self.merge:
            why = "of four tokens one is what others are merged into"
            raise ValueError(f"search.merge={list(self.merge)} must be shares above 0, up to {MOST_MERGED}: {why}")
        for name in ("target_fraction", "target_ms"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"search.{name}={value} must be above 0")


@dataclass
class DecoderConfig:
    """A pruned VAE decoder.

    `width` is the share of channels that stays: a number, or one per level in the order of the VAE's
    `block_out_channels`. `importance` is the criterion: magnitude, taylor, activation_energy, random or first, where
    taylor and activation_energy look at `samples` latents. `norm_groups`: whole groups of its norms stay or go (whole),
    or every group keeps the same share of its channels (per_group). The decoder is timed on `latent_sizes` (null: the
    model's own and twice that) and `batches`. `frames`: of each video CogVideoX's and Wan's decoders learn from and are
    timed on so many, from the first on (null: all).
    """

    width: Any = 0.5
    importance: str = "magnitude"
    norm_groups: str = "whole"
    samples: int = 32
    latent_sizes: list[int] | None = None
    batches: list[int] = field(default_factory=lambda: [1, 4])
    frames: int | None = None

    def __post_init__(self) -> None:
        check_minimum("decoder", self, 1, "samples")
        check_choice("decoder", self, norm_groups=NORM_GROUPS, importance=IMPORTANCE)
        shares = self.width if OmegaConf.is_list(self.width) or isinstance(self.width, list) else [self.width]
        if not shares or not all(isinstance(share, (int, float)) and 0 < share <= 1 for share in shares):
            raise ValueError(f"decoder.width={self.width} must be a share above 0 and at most 1, or a list of them")
        for name in ("latent_sizes", "batches"):
            if (values := getattr(self, name)) is not None and not (values and all(value >= 1 for value in values)):
                raise ValueError(f"decoder.{name}={values} must be a list of numbers from 1 up")


@dataclass
class Config(slimstep.eval.config.Config):
    """The keys of the jobs that prune."""

    recovery: StageConfig = field(default_factory=StageConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
