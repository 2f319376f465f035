"""What a network computes on its way to its prediction, read while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn


@contextmanager
def features_of(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the output of every level, or of every block of a transformer, while the block runs, by module path
    within the network."""
    features: dict[str, Tensor] = {}
    handles = []
    bare = extract_model_from_parallel(unet, keep_torch_compile=False)
    blocks = [block for block, kind in getattr(bare, "kinds", {}).items() if kind == "transformer"]

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # A block of a transformer gives what it makes of the text before what it makes of the image.
            features[name] = output[-1 if name in blocks else 0] if isinstance(output, tuple) else output

        return hook

    for path, module in unet.named_modules():
        name = path.removeprefix("module.").removeprefix("_orig_mod.")
        level, _, index = name.partition(".")
        is_level = level in ("down_blocks", "up_blocks") and index.isdigit()
        if name == "mid_block" or is_level or name in blocks:
            handles.append(module.register_forward_hook(keep(name)))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
