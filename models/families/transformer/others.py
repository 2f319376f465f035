"""Transformers of diffusers that no family drives: blocks are removed and masked in the network on its own.

    network = prunable(LTXVideoTransformer3DModel.from_pretrained(DIR))
    to_stock(network.with_architecture({"transformer_blocks.7": 0})).save_pretrained(OUT)  # stock.py: diffusers' own

What stands in `OTHERS` was found by running small networks of each class (tests/models/families/test_others.py): an
export is the network in memory, and a closed mask is the removed block, to the bit.
"""

from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

from diffusers import ModelMixin

from slimstep.models.families.transformer.network import PrunableTransformer
from slimstep.models.families.transformer.networks.cogvideox import PrunableCogVideoXTransformer3DModel
from slimstep.models.families.transformer.networks.flux import PrunableFluxTransformer2DModel
from slimstep.models.families.transformer.networks.pixart import PrunablePixArtTransformer2DModel
from slimstep.models.families.transformer.networks.qwen import PrunableQwenImageTransformer2DModel
from slimstep.models.families.transformer.networks.sana import PrunableSanaTransformer2DModel
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.transformer.networks.wan import PrunableWanTransformer3DModel

OF_FAMILIES = {kind.STOCK.__name__: kind for kind in (
    PrunableSD3Transformer2DModel, PrunablePixArtTransformer2DModel, PrunableFluxTransformer2DModel,
    PrunableSanaTransformer2DModel, PrunableQwenImageTransformer2DModel, PrunableCogVideoXTransformer3DModel,
    PrunableWanTransformer3DModel,
)}  # fmt: skip


class BlockList(NamedTuple):
    """count: the field of config.json that holds a list's length. streams: the arguments that a block gives back.
    stays: {number of a block: why it cannot be removed}."""

    count: str
    streams: tuple[str, ...] = ("hidden_states",)
    stays: Mapping[int, str] = {}


IMAGE_TEXT = ("hidden_states", "encoder_hidden_states")
TEXT_IMAGE = ("encoder_hidden_states", "hidden_states")
BLOCKS = {"blocks": BlockList("num_layers")}
LAYERS = {"layers": BlockList("num_layers")}
TRANSFORMER_BLOCKS = {"transformer_blocks": BlockList("num_layers")}
DOUBLE_BLOCKS = {"double_blocks": BlockList("num_layers", IMAGE_TEXT)}
JOINT_BLOCKS = {"transformer_blocks": BlockList("num_layers", IMAGE_TEXT)}
AS_FLUX = {"transformer_blocks": BlockList("num_layers", TEXT_IMAGE),
           "single_transformer_blocks": BlockList("num_single_layers", TEXT_IMAGE)}  # fmt: skip
AS_HUNYUAN = {"transformer_blocks": BlockList("num_layers", IMAGE_TEXT),
              "single_transformer_blocks": BlockList("num_single_layers", IMAGE_TEXT)}  # fmt: skip
FIRST = "the embedding in it also conditions the output"
LAST = "it has no text branch, and no other block of this class can go without one"
OTHERS: Mapping[str, Mapping[str, BlockList]] = {
    "AllegroTransformer3DModel": TRANSFORMER_BLOCKS,
    "AnyFlowFARTransformer3DModel": BLOCKS,
    "AnyFlowTransformer3DModel": BLOCKS,
    "AuraFlowTransformer2DModel": {
        "joint_transformer_blocks": BlockList("num_mmdit_layers", TEXT_IMAGE),
        "single_transformer_blocks": BlockList("num_single_dit_layers"),
    },
    "BriaTransformer2DModel": AS_FLUX,
    "ChronoEditTransformer3DModel": BLOCKS,
    "CogView3PlusTransformer2DModel": JOINT_BLOCKS,
    "CogView4Transformer2DModel": JOINT_BLOCKS,
    "CosmosTransformer3DModel": TRANSFORMER_BLOCKS,
    "DiTTransformer2DModel": {"transformer_blocks": BlockList("num_layers", stays={0: FIRST})},
    "ErnieImageTransformer2DModel": {"layers": BlockList("num_layers", ("x",))},
    "Flux2Transformer2DModel": {
        "transformer_blocks": BlockList("num_layers", TEXT_IMAGE),
        "single_transformer_blocks": BlockList("num_single_layers"),
    },
    "GlmImageTransformer2DModel": JOINT_BLOCKS,
    "HeliosTransformer3DModel": BLOCKS,
    "HunyuanVideo15Transformer3DModel": JOINT_BLOCKS,
    "HunyuanVideoFramepackTransformer3DModel": AS_HUNYUAN,
    "HunyuanVideoTransformer3DModel": AS_HUNYUAN,
    "Ideogram4Transformer2DModel": LAYERS,
    "JoyImageEditPlusTransformer3DModel": DOUBLE_BLOCKS,
    "JoyImageEditTransformer3DModel": DOUBLE_BLOCKS,
    "Krea2Transformer2DModel": TRANSFORMER_BLOCKS,
    "LTX2VideoTransformer3DModel": {
        "transformer_blocks": BlockList("num_layers", ("hidden_states", "audio_hidden_states")),
    },
    "LTXVideoTransformer3DModel": TRANSFORMER_BLOCKS,
    "LongCatAudioDiTTransformer": {"blocks": BlockList("dit_depth")},
    "LongCatImageTransformer2DModel": AS_FLUX,
    "Lumina2Transformer2DModel": LAYERS,
    "LuminaNextDiT2DModel": LAYERS,
    "MiniMaxH3Transformer3DModel": TRANSFORMER_BLOCKS,
    "MiniMaxMusic3Transformer1DModel": TRANSFORMER_BLOCKS,
    "MochiTransformer3DModel": {"transformer_blocks": BlockList("num_layers", IMAGE_TEXT, stays={-1: LAST})},
    "OmniGenTransformer2DModel": LAYERS,
    "OvisImageTransformer2DModel": AS_FLUX,
    "PRXTransformer2DModel": {"blocks": BlockList("depth")},
    "SanaVideoTransformer3DModel": TRANSFORMER_BLOCKS,
    "SkyReelsV2Transformer3DModel": BLOCKS,
    "StableAudio3DiTModel": {"transformer_blocks": BlockList("depth")},
    "ZImageTransformer2DModel": {"layers": BlockList("n_layers", ("x",))},
}
COUPLED = "its blocks go with a second list, entry by entry: {}"
REFUSED = {
    "AceStepTransformer1DModel": "its layers attend in turn to their neighbours and to all, by number: in a file of "
    "fewer layers those behind a removed one silently change from one to the other",
    "BriaFibo2Transformer2DModel": "injection_layer_ids names its layers by number",
    "BriaFiboTransformer2DModel": COUPLED.format("caption_projection"),
    "ChromaTransformer2DModel": "one approximator gives all modulations, a row for each block by its number: a file of "
    "fewer blocks loads in diffusers, and silently computes something else",
    "ConsisIDTransformer3DModel": COUPLED.format("its perceivers"),
    "Cosmos3OmniTransformer": "a block that the mask leaves out is not the removed one",
    "EasyAnimateTransformer3DModel": "its first mmdit_layers blocks are of another kind than the others",
    "HiDreamImageTransformer2DModel": COUPLED.format("caption_projection, llama_layers"),
    "HunyuanDiT2DModel": "its second half takes skip connections from its first: only pairs could go",
    "LatteTransformer3DModel": COUPLED.format("temporal_transformer_blocks"),
    "MotifVideoTransformer3DModel": "its last num_decoder_layers single blocks are of another kind than the others",
    "NucleusMoEImageTransformer2DModel": COUPLED.format("capacity_factors, and its kinds of layers, by number"),
    "SanaWMTransformer3DModel": "every softmax_every_n-th of its blocks attends in another way",
    "WanAnimateTransformer3DModel": COUPLED.format("face_adapter"),
    "WanVACETransformer3DModel": COUPLED.format("vace_blocks, by vace_layers"),
}


def prunable(network: ModelMixin) -> PrunableTransformer:
    """A prunable network with copies of a stock one's weights. ValueError as `prunable_class` raises it."""
    return prunable_class(type(network)).from_unet(network)


@cache
def prunable_class(stock: type[ModelMixin]) -> type[PrunableTransformer]:
    """The prunable subclass of a transformer of diffusers: that of its family, or one made by `OTHERS`.

    Raises ValueError for a class that is refused, with the reason, and for one not known, with the list of those that
    are.
    """
    name = stock.__name__
    if name in OF_FAMILIES:
        return OF_FAMILIES[name]
    if name not in OTHERS:
        known = ", ".join(sorted({*OF_FAMILIES, *OTHERS}))
        reason = REFUSED.get(name, "it was never tried")
        raise ValueError(f"blocks of a {name} cannot be removed: {reason}; these classes are known: {known}")
    lists = OTHERS[name]
    own: dict[str, Any] = {
        "STOCK": stock,
        "LISTS": {path: of.count for path, of in lists.items()},
        "STREAMS": {path: of.streams for path, of in lists.items()},
        "STAYS": {(path, number): why for path, of in lists.items() for number, why in of.stays.items()},
        "can_be_copied": lambda network, block: False,  # which of its layers make a copy the identity is not known
        "INPUT": [*signature(stock.forward).parameters][1],  # after self
        "__doc__": f"A {name} with an architecture table and block masks (network.py).",
        "_repeated_blocks": [f"{prefix}{block}" for block in stock._repeated_blocks or () for prefix in ("", "Masked")],
    }
    if "blocks" in lists:  # the class's own list has the name, and `all_blocks` says the paths
        own["blocks"] = property(lambda network: network._modules["blocks"])
    return type(f"Prunable{name}", (PrunableTransformer, stock), own)
