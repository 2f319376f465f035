"""What a family makes of a pipeline for its export, and where each block went."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffusers import DiffusionPipeline, ModelMixin

from slimstep.models.architecture import copies
from slimstep.models.families.prunable import Prunable


class Exported(NamedTuple):
    """pipeline: with diffusers' own classes where they can express its networks. obstacles: why not, else.
    blocks: as `block_map` says it."""

    pipeline: DiffusionPipeline
    obstacles: tuple[str, ...]
    blocks: Mapping[str, Sequence[str]]


def block_map(network: ModelMixin, paths: Mapping[str, str]) -> dict[str, list[str]]:
    """{block of the full network: the paths of it and its copies in the export, none where it is removed}, and so of
    other modules whose path is another there. `paths` are those that change. Empty for networks that are not pruned."""
    if not isinstance(network, Prunable):
        return {}
    running = {block: (block, *copies(block, network.architecture)) for block in network.kept_blocks}
    blocks = {block: [paths.get(path, path) for path in running.get(block, ())] for block in network.all_blocks}
    copied = {path for of in running.values() for path in of}
    return {old: [new] for old, new in paths.items() if old not in copied} | blocks


def chained(first: Mapping[str, Sequence[str]], then: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Where each block of the full model is after two exports, the second of what the first wrote."""
    if not first:
        return {old: list(paths) for old, paths in then.items()}
    return {old: [new for path in paths for new in then.get(path, [path])] for old, paths in first.items()}
