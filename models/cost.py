"""How large and how expensive a UNet is: parameters, and floating point operations of one forward pass.

Axes: B batch, C channels, H and W latent height and width, L tokens, E text width.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

NUM_TOKENS = 77


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_gflops(unet: UNet2DConditionModel, latent_size: int | None = None, batch: int = 1, tokens: int = NUM_TOKENS):
    """10⁹ floating point operations of one forward; a multiply and an add are two, attention's matmuls included.

    latent_size: H = W in latents; the config's sample_size if None. Counted on the meta device: torch misses fused
    attention on CPU tensors in some versions.
    """
    size = unet.config.sample_size if latent_size is None else latent_size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta = type(unet).from_config(dict(unet.config))
        on_meta(**unet_inputs(on_meta, size, batch, tokens))
    return counter.get_total_flops() / 1e9


def count_activation_bytes(unet: UNet2DConditionModel, batch: int, tokens: int = NUM_TOKENS) -> int:
    """Bytes in float32 that a forward of `batch` samples keeps for its backward, parameters not counted.

    Counted on fake CPU tensors, every storage once: the meta device would take the attention that keeps its matrix.
    Gradient checkpointing and mixed precision keep less.
    """
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with FakeTensorMode():
        fake = type(unet).from_config(dict(unet.config)).train()
        inputs = unet_inputs(fake, unet.config.sample_size, batch, tokens)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            fake(**inputs)
    own = {parameter.untyped_storage()._cdata for parameter in fake.parameters()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def unet_inputs(unet: UNet2DConditionModel, size: int, batch: int, tokens: int) -> dict:
    """Empty arguments for the UNet's forward, of the shapes its config asks for, on the default device."""
    text_width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    inputs = {
        "sample": torch.empty(batch, unet.config.in_channels, size, size),
        "timestep": torch.empty(batch),
        "encoder_hidden_states": torch.empty(batch, tokens, text_width),
    }
    if unet.config.addition_embed_type == "text_time":  # SDXL: pooled text, and sizes and crops as six numbers
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
    return inputs
