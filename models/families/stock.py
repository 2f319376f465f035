"""Which pruned UNets diffusers' own classes can express, and the conversion to them.

A stock configuration says: how many layers (ResNet and attention, or ResNet alone) each level has on the way down, one
more on the way up; whether there is a mid block; and what a class adds to that in a plan of its own (unet2d/stock.py,
ddpm/stock.py). A pruned UNet fits when its kept blocks, renumbered, are such a network *and* every kept up ResNet gets
the very skip connection it had: a removed down layer is the identity, so it leaves its predecessor's features a second
time on the stack of skip connections, and one of the two up ResNets that would consume them has to be gone with
`drop_skip`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights

from slimstep.models.architecture import copies, departures
from slimstep.models.families.unet import PrunableUNet


@dataclass(frozen=True)
class StockEquivalent:
    """config: that of diffusers' own class, or None where `obstacles` (one block and its reason each) prevent it.
    paths: of the modules that have another path there, and it."""

    config: dict | None
    obstacles: tuple[str, ...]
    paths: Mapping[str, str] = field(default_factory=dict)


def public_fields(unet: ModelMixin) -> dict:
    """The stock fields of a UNet's config."""
    private = ("depths", "bypass", "auto_map")
    return {k: v for k, v in unet.config.items() if not k.startswith("_") and k not in private}


class StockPlan:
    """One conversion: the stock config, the new path of each module that moves, and what stands in the way.

    A class says `WITHOUT_ATTENTION`, {type of a level: the type that it has without attentions}, and how its stock
    configuration writes down the middle (`mid_fields`) and the levels (`level_fields`).
    """

    WITHOUT_ATTENTION: Mapping[str, str]

    def __init__(self, unet: PrunableUNet):
        self.unet, self.obstacles, self.paths = unet, [], {}
        self.num_removed_levels = sum(level in unet.architecture for level in unet.levels)
        self.num_levels = len(unet.config.down_block_types) - self.num_removed_levels
        self.down = [Level(self, f"down_blocks.{i}", f"down_blocks.{i}") for i in range(self.num_levels)]
        self.up = [
            Level(self, f"up_blocks.{i + self.num_removed_levels}", f"up_blocks.{i}") for i in range(self.num_levels)
        ]
        for block, spec in unet.architecture.items():
            for how in departures(spec):
                self.obstruct(block, f"is {how}")
        self.mid = self.mid_fields()
        if not self.obstacles:
            self.check_skip_connections()
        self.config = public_fields(unet) | self.mid | self.level_fields()

    @property
    def equivalent(self) -> StockEquivalent:
        if self.obstacles:
            return StockEquivalent(None, tuple(self.obstacles))
        return StockEquivalent(self.config, (), self.paths)

    def network(self) -> ModelMixin:
        """The stock UNet with the pruned one's output: copies of its weights, renumbered; ValueError if none is."""
        kind, unet = self.unet.STOCK, self.unet
        if self.obstacles:
            raise ValueError(f"no stock {kind.__name__} is this network, because of {'; '.join(self.obstacles)}")
        with torch.device("meta"), no_init_weights():
            stock = kind.from_config(self.config)
        stock.load_state_dict({self.renamed(k): w.detach().clone() for k, w in unet.state_dict().items()}, assign=True)
        return stock.train(unet.training)

    def mid_fields(self) -> dict:
        """What the config says of the middle; names what has no place there."""
        raise NotImplementedError

    def level_fields(self) -> dict:
        """Everything the config says of each level; names what has no place there."""
        return {
            "block_out_channels": list(self.unet.config.block_out_channels[: self.num_levels]),
            "down_block_types": [level.block_type for level in self.down],
            "up_block_types": [level.block_type for level in self.up],
        }

    def middle(self) -> tuple[list[str], list[str]]:
        """All blocks of the middle, but for layers, and those of them that are kept."""
        blocks = [s for s in self.unet.blocks if s.startswith("mid_block.") and s not in self.unet.parents]
        kept = [s for s in blocks if self.unet.repeats(s)]
        for block in kept:
            if self.unet.kinds[block] == "attention":
                number_layers(self, block, block)
            if self.unet.repeats(block) > 1:
                self.obstruct(block, "is copied")
        return blocks, kept

    def renamed(self, key: str) -> str:
        """A weight's name in the stock UNet."""
        parts = key.split(".")
        for n in range(len(parts), 0, -1):
            if (path := ".".join(parts[:n])) in self.paths:
                return ".".join((self.paths[path], *parts[n:]))
        return key

    def obstruct(self, block: str, reason: str) -> None:
        self.obstacles.append(f"{block} ({reason})")

    def check_skip_connections(self) -> None:
        """Every kept up ResNet must find on the stock UNet's stack of skip connections what it had on this one's."""
        stack, stock_stack = ["conv_in"], ["conv_in"]
        for i, level in enumerate(self.down):
            for layer in range(level.num_layers):
                stack.append(f"{level.path}.resnets.{layer}" if layer in level.kept else stack[-1])
            stack += [f"{level.path}.downsamplers.0"] * (i < self.num_levels - 1)
        stock_stack = list(dict.fromkeys(stack))
        for up, down in zip(self.up, reversed(self.down), strict=True):
            if len(up.kept) != len(down.kept) + 1:
                numbers = f"keeps {len(up.kept)} layers where {down.path} keeps {len(down.kept)}"
                self.obstruct(up.path, f"{numbers}; a stock UNet has one more on the way up")
                return
            for layer in range(up.num_layers):
                skip = stack.pop()
                if layer in up.kept and skip != stock_stack.pop():
                    self.obstruct(f"{up.path}.resnets.{layer}", f"would lose its skip connection from {skip}")
                    return


class Level:
    """The layers of one down or up block that stay: `kept` their indices, `transformer_layers` of each attention."""

    def __init__(self, plan: StockPlan, path: str, new_path: str):
        self.path, unet = path, plan.unet
        index = int(path.split(".")[1])
        self.num_layers = sum(s.startswith(f"{path}.resnets.") for s in unet.blocks)
        resnets = [f"{path}.resnets.{i}" for i in range(self.num_layers)]
        attentions = [s for s in (f"{path}.attentions.{i}" for i in range(self.num_layers)) if s in unet.blocks]
        self.kept = [i for i, block in enumerate(resnets) if unet.repeats(block)]
        self.transformer_layers = [count_layers(unet, block) for block in attentions if unet.repeats(block)]
        types = unet.config.down_block_types if path.startswith("down") else unet.config.up_block_types
        self.own_type = types[index]
        self.block_type = plan.WITHOUT_ATTENTION.get(self.own_type, self.own_type)
        if self.transformer_layers:
            self.block_type = self.own_type

        plan.paths[path] = new_path
        for new, old in enumerate(self.kept):
            plan.paths[resnets[old]] = f"{new_path}.resnets.{new}"
            if attentions and unet.repeats(attentions[old]):
                number_layers(plan, attentions[old], f"{new_path}.attentions.{new}")
        self.check(plan, resnets, attentions)

    def check(self, plan: StockPlan, resnets: list[str], attentions: list[str]) -> None:
        """Name the blocks of this level that fit no stock configuration."""
        unet = plan.unet
        if self.block_type not in (*plan.WITHOUT_ATTENTION, *plan.WITHOUT_ATTENTION.values()):
            for block in (s for s in resnets if not unet.repeats(s)):
                plan.obstruct(block, f"is removed from a {self.block_type}, whose other parts stay")
        for block in (s for s in (*resnets, *attentions) if unet.repeats(s) > 1):
            plan.obstruct(block, "is copied")
        for block in (s for s in resnets if not unet.repeats(s) and unet.skip_rules.get(s) == "shortcut"):
            plan.obstruct(block, "is removed but for its 1×1 shortcut")
        for i, block in enumerate(attentions):
            if unet.repeats(block) and i not in self.kept:
                plan.obstruct(block, "stays without its ResNet")
            elif not unet.repeats(block) and i in self.kept and self.transformer_layers:
                plan.obstruct(block, "is removed while another of its level stays")


def count_layers(unet: PrunableUNet, attention: str) -> int:
    """How many layers a kept transformer has; copies of layers count."""
    layers = [s for s, parent in unet.parents.items() if parent == attention]
    return sum(map(unet.repeats, layers)) if layers else 1


def number_layers(plan: StockPlan, attention: str, new_path: str) -> None:
    """Renumber a transformer and its layers, copies in line behind what they copy."""
    plan.paths[attention] = new_path
    new = 0
    for layer in (s for s, parent in plan.unet.parents.items() if parent == attention):
        running = [layer, *copies(layer, plan.unet.architecture)] if plan.unet.repeats(layer) else []
        for path in running:
            plan.paths[path] = f"{new_path}.transformer_blocks.{new}"
            new += 1


def simplest(values: list):
    """One value where all are equal, else the list; None for an empty list."""
    return values[0] if values and all(v == values[0] for v in values) else values or None
