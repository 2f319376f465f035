"""A transformer of whole blocks is one of diffusers' own class: they are numbered anew, and config.json counts them."""

import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import no_init_weights

from slimstep.models.architecture import departures
from slimstep.models.families.transformer.network import PrunableTransformer, adopt_rest

OWN_FIELDS = ("depths", "bypass", "auto_map", "sublayers")


def stock_paths(network: PrunableTransformer) -> dict[str, str]:
    """{path of a module that runs: its path in the stock network}; copies stand in line behind what they copy."""
    return {path: f"{name}.{k}" for name in network.LISTS for k, path in enumerate(network.running_paths(name))}


def stock_config(network: ModelMixin) -> dict:
    """The stock configuration with the pruned network's output."""
    fields = {k: v for k, v in network.config.items() if not k.startswith("_") and k not in OWN_FIELDS}
    if not isinstance(network, PrunableTransformer):
        return fields
    counts = {count: len([*network.running_paths(name)]) for name, count in network.LISTS.items()}
    return fields | counts | network.size_fields() | network.stock_fields()


def obstacles_of(network: ModelMixin) -> tuple[str, ...]:
    """Why a network is not one of diffusers' own class: the sublayers that it lacks, and what is narrower or computes
    in another dtype."""
    if not isinstance(network, PrunableTransformer):
        return ()
    table = network.architecture
    changed = {path: "removed" for path in network.parents if path in table and table[path].repeats == 0}
    changed |= {path: " and ".join(how) for path, spec in table.items() if (how := departures(spec))}
    alike = f"and the blocks of a {network.STOCK.__name__} are all alike"
    return tuple(f"{path} is {how}, {alike}" for path, how in changed.items())


def to_stock(network: ModelMixin) -> ModelMixin:
    """The stock network with the pruned one's output: copies of its weights, renumbered. ValueError where its
    blocks are not all alike."""
    if not isinstance(network, PrunableTransformer):
        return network
    if obstacles := obstacles_of(network):
        raise ValueError(f"no {network.STOCK.__name__} is this network, because {'; '.join(obstacles)}")
    paths = stock_paths(network)
    with torch.device("meta"), no_init_weights():
        stock = network.STOCK.from_config(stock_config(network))
    weights = network.stock_weights(network.state_dict())
    stock.load_state_dict({renamed(key, paths): w.detach().clone() for key, w in weights.items()}, assign=True)
    adopt_rest(stock, network, network.LISTS)
    return stock.train(network.training)


def renamed(key: str, paths: dict[str, str]) -> str:
    """A weight's name in the stock network."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        if (path := ".".join(parts[:n])) in paths:
            return ".".join((paths[path], *parts[n:]))
    return key
