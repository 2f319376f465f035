"""The bundled model of videos: Wan's blocks and its causal VAE at small widths, and a text encoder of T5's layers.

`WanPipeline` holds it. That pipeline fills the states of a caption up with zeros, `max_sequence_length` in all, which
the cross-attention sees, all alike. Training has one of those behind the longest caption, which attention counts as
often as the pipeline appends it.

Axes: B batch, C channels, F frames, H and W pixels or latents, L text tokens, E text width.
"""

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, UMT5Config, UMT5EncoderModel

from scripts.shapes_models import VAEWithPosterior, plain
from scripts.shapes_transformer import build_flow_scheduler
from slimstep.data.shapes_tokenizer import build_tokenizer
from slimstep.data.shapes_video import VIDEO_WORDS

FRAMES, LATENT_SIZE, COMPRESSION = 9, 4, 2  # of videos of 32×32 px; of time
LOG_VARIANCE = -6.0  # of the latents' noise, when training begins
PIXELS, PATCH_SIZE = 4, 2  # of one position of the VAE; latents of one token


def build_video_tokenizer(max_tokens: int) -> CLIPTokenizer:
    """One token for each word of the captions of shapes_video."""
    tokenizer = build_tokenizer(VIDEO_WORDS)
    tokenizer.model_max_length = max_tokens
    return tokenizer


def build_video_vae(config: DictConfig) -> AutoencoderKLWan:
    """A latent of each 8×8 pixels of the first frame and of every two others: 4×4 pixels are channels, and one level
    halves height, width and time. Wan 2.2 makes channels of pixels, too."""
    vae = AutoencoderKLWan(
        in_channels=3 * PIXELS**2, out_channels=3 * PIXELS**2, patch_size=PIXELS, temperal_downsample=[True],
        latents_mean=[0.0] * config.z_dim, latents_std=[1.0] * config.z_dim, scale_factor_temporal=COMPRESSION,
        scale_factor_spatial=2 * PIXELS, **plain(config),
    )  # fmt: skip
    # With noise of unit variance it learns the background, which all latents tell alike, and then nothing more.
    nn.init.constant_(vae.quant_conv.bias[config.z_dim :], LOG_VARIANCE)
    return vae


@torch.no_grad()
def begin_with_still_pictures(vae: AutoencoderKLWan) -> None:
    """After a training on single frames, which uses no tap of the past and no convolution of time alone: what is coded
    is the last of two frames by itself, twice."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3):
            module.weight[:, :, :-1] = 0
        elif isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 1, 1):
            module.weight.zero_()
            module.bias.zero_()
            times = module.out_channels // module.in_channels
            module.weight[:, :, -1, 0, 0] = torch.eye(module.in_channels).repeat(times, 1)


class VideoVAEWithPosterior(VAEWithPosterior):
    """The same of videos, before diffusers clamps them: what is beyond the range would have no gradient back."""

    def painted(self, latents_BCFHW: Tensor) -> Tensor:
        chunks: list[Tensor] = []
        hook = self.vae.decoder.register_forward_hook(lambda module, inputs, output: chunks.append(output))
        self.vae.decode(latents_BCFHW)
        hook.remove()
        return unpatchify(torch.cat(chunks, dim=2), PIXELS)


def build_video_text_encoder(config: DictConfig, tokenizer: CLIPTokenizer) -> UMT5EncoderModel:
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **special, **plain(config)))


class CaptionStates(nn.Module):
    """The text encoder as the stock pipeline calls it. It is its stack alone, which has all of its weights once."""

    def __init__(self, config: DictConfig, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.end = tokenizer.eos_token_id
        self.stack = build_video_text_encoder(config, tokenizer).encoder

    def ends(self, ids_BL: Tensor) -> Tensor:
        """[B]: where each caption's last token is; the same token fills up behind it."""
        return (ids_BL == self.end).long().argmax(1)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """[B, L, E], zeros behind the token that ends the caption."""
        mask_BL = (torch.arange(ids_BL.shape[1], device=ids_BL.device) <= self.ends(ids_BL)[:, None]).long()
        return self.stack(ids_BL, mask_BL).last_hidden_state * mask_BL[..., None]


class CaptionReader(nn.Module):
    """The text encoder and, for its training alone, linear readings of a scene's attributes from the last token."""

    def __init__(self, text: CaptionStates, classes: list[int]) -> None:
        super().__init__()
        self.text, self.classes = text, classes
        self.names = nn.Linear(text.stack.config.d_model, sum(classes))

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States [B, L, E] and logits per attribute."""
        states_BLE = self.text(ids_BL)
        last_BE = states_BLE[torch.arange(len(ids_BL)), self.text.ends(ids_BL)]
        return states_BLE, self.names(last_BE).split(self.classes, dim=1)


class TextToVideoFlow(nn.Module):
    """Text encoder and transformer, trained together: the caption is read by what has to be painted."""

    def __init__(self, config: DictConfig, tokenizer: CLIPTokenizer, latent_channels: int) -> None:
        super().__init__()
        self.text = CaptionStates(config.text, tokenizer)
        self.transformer = WanTransformer3DModel(
            patch_size=(1, PATCH_SIZE, PATCH_SIZE), in_channels=latent_channels, out_channels=latent_channels,
            text_dim=config.text.d_model, rope_max_seq_len=32, **plain(config.model),
        )  # fmt: skip
        # diffusers' class has none of these fields: its pipeline draws 81 frames of 480×832 px where it is not told.
        self.transformer.register_to_config(
            sample_size=LATENT_SIZE, sample_frames=FRAMES, temporal_compression_ratio=COMPRESSION
        )
        begin_as_identity(self.transformer)
        self.text_attention = CountedTextAttention()
        for block in self.transformer.blocks:
            block.attn2.set_processor(self.text_attention)

    def forward(self, x_BCFHW: Tensor, t_B: Tensor, ids_BL: Tensor, padding_B: Tensor) -> Tensor:
        """The flow at the timesteps t_B, as in the stock pipeline's call with max_sequence_length = L + padding_B."""
        text_BLE = F.pad(self.text(ids_BL), (0, 0, 0, 1))
        bias_B11L = text_BLE.new_zeros(len(text_BLE), 1, 1, text_BLE.shape[1])
        bias_B11L[..., -1] = padding_B.log()[:, None, None]  # softmax weighs this key exp(log n) = n times
        self.text_attention.bias_B11L = bias_B11L
        return self.transformer(x_BCFHW, t_B, text_BLE, return_dict=False)[0]


class CountedTextAttention(WanAttnProcessor):
    """Wan's attention, with a bias of the keys, for which the transformer's call has no argument."""

    bias_B11L: Tensor

    def __call__(self, attn: WanAttention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias_B11L)


@torch.no_grad()
def begin_as_identity(transformer: WanTransformer3DModel) -> None:
    """DiT's initialisation (Peebles & Xie 2023, section 3.2), by the gates, the outputs of cross-attention, which has
    no gate, and the last layer."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.blocks:
        nn.init.zeros_(block.scale_shift_table)
        nn.init.zeros_(block.attn2.to_out[0].weight)
    for layer in (transformer.condition_embedder.time_proj, transformer.proj_out):
        nn.init.zeros_(layer.weight)


def build_video_pipeline(model: TextToVideoFlow, vae: AutoencoderKLWan, config: DictConfig) -> WanPipeline:
    """The stock pipeline around the networks."""
    for block in model.transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    tokenizer = build_video_tokenizer(config.max_tokens)
    text_encoder = build_video_text_encoder(config.text, tokenizer)
    text_encoder.encoder.load_state_dict(model.text.stack.state_dict())
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=model.transformer,
        scheduler=build_flow_scheduler(),
    )  # fmt: skip
