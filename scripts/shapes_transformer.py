"""The bundled flow-matching transformer: Stable Diffusion 3's joint blocks at a small width, and two text encoders.

`StableDiffusion3Pipeline` holds it. That pipeline reads the penultimate states of two CLIP text encoders, side by side,
and both projected states of the end token. A third one, T5, is there because the folder does not load without: it has
no layers and gives `max_sequence_length` zeros, as the pipeline does where there is none. They all stay alike in every
block, for the context has no positions. Training has one of them therefore, which attention counts that many times.

Axes: B batch, C channels, H and W latents, L text tokens, E text width, J image and text tokens.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from scripts.shapes_models import LATENT_SIZE, plain
from slimstep.data.shapes_tokenizer import build_tokenizer

PATCH_SIZE = 2


class TextToImageFlow(nn.Module):
    """Both text encoders and the transformer, trained together: the caption is read by what has to be painted."""

    def __init__(self, config: DictConfig, tokenizer: CLIPTokenizer, latent_channels: int) -> None:
        super().__init__()
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

        def text_encoder(shape: DictConfig, scale: float = 1) -> CLIPTextModelWithProjection:
            return CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(tokenizer), max_position_embeddings=config.max_tokens,
                    layer_norm_eps=1e-5 / scale**2, projection_dim=shape.hidden_size, **special, **plain(shape),
                )
            )  # fmt: skip

        self.max_tokens, self.text_scale = config.max_tokens, config.text_scale
        self.text_encoder = text_encoder(config.text, config.text_scale)
        self.text_encoder_2 = text_encoder(config.text_2)
        text_width = config.text.hidden_size + config.text_2.hidden_size
        model = plain(config.model)
        self.transformer = SD3Transformer2DModel(
            sample_size=LATENT_SIZE, patch_size=PATCH_SIZE, pos_embed_max_size=LATENT_SIZE // PATCH_SIZE,
            in_channels=latent_channels, out_channels=latent_channels, joint_attention_dim=text_width,
            pooled_projection_dim=text_width, qk_norm="rms_norm",
            caption_projection_dim=model["num_attention_heads"] * model["attention_head_dim"], **model,
        )  # fmt: skip
        init_adaln_zero(self.transformer)
        for embedding in (self.text_encoder_2.text_model.embeddings.token_embedding,
                          self.text_encoder_2.text_model.embeddings.position_embedding):  # fmt: skip
            nn.init.normal_(embedding.weight)  # these are what it gives: the states before its one layer

    @torch.no_grad()
    def begin_from(self, encoder: CLIPTextModel, ids_BL: Tensor) -> None:
        """The first text encoder starts with another's embeddings and layers, which stay as they are; its last is new.

        The pipeline reads states before their final norm, and the bundled encoder's have a deviation of 12 there. So
        all that adds to them is divided by `text_scale`, and the epsilon of the norms by its square, which changes no
        norm's output. The transformer starts with features of mean 0 and variance 1 over the captions `ids_BL`.
        """
        state = {f"text_model.{name}": weight for name, weight in encoder.state_dict().items()}
        positions = "text_model.embeddings.position_embedding.weight"
        state[positions] = state[positions][: self.max_tokens]
        added = ("_embedding.", ".out_proj.", ".fc2.")
        state = {name: w / self.text_scale if any(part in name for part in added) else w for name, w in state.items()}
        self.text_encoder.load_state_dict(state, strict=False)
        for name, parameter in self.text_encoder.named_parameters():
            parameter.requires_grad_(name not in state or "final_layer_norm" in name)
        text_BLE, _ = self.encode(ids_BL)
        deviation_E, mean_E = torch.std_mean(text_BLE, dim=(0, 1))
        embedder = self.transformer.context_embedder
        embedder.weight /= deviation_E
        embedder.bias -= embedder.weight @ mean_E

    def encode(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Text states [B, L, E] and pooled ones [B, E], as the stock pipeline makes them."""
        texts = [encoder(ids_BL, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        text_BLE = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
        return text_BLE, torch.cat([text.text_embeds for text in texts], dim=-1)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, ids_BL: Tensor, padding_B: Tensor) -> Tensor:
        """The flow at the timesteps t_B, as in the stock pipeline's call with max_sequence_length=padding_B."""
        text_BLE, pooled_BE = self.encode(ids_BL)
        num_tokens = (x_BCHW.shape[-1] // PATCH_SIZE) * (x_BCHW.shape[-2] // PATCH_SIZE) + text_BLE.shape[1] + 1
        bias_B11J = x_BCHW.new_zeros(len(x_BCHW), 1, 1, num_tokens)
        bias_B11J[..., -1] = padding_B.log()[:, None, None]  # softmax weighs this key exp(log n) = n times
        return self.transformer(
            x_BCHW, F.pad(text_BLE, (0, 0, 0, 1)), pooled_BE, t_B,
            joint_attention_kwargs={"attention_mask": bias_B11J}, return_dict=False,
        )[0]  # fmt: skip


class MaskedJointAttention:
    """diffusers' JointAttnProcessor2_0, which drops the mask that it is handed, with that mask."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        query = [attn.norm_q(heads(attn.to_q(image))), attn.norm_added_q(heads(attn.add_q_proj(text)))]
        key = [attn.norm_k(heads(attn.to_k(image))), attn.norm_added_k(heads(attn.add_k_proj(text)))]
        value = [heads(attn.to_v(image)), heads(attn.add_v_proj(text))]
        joint = F.scaled_dot_product_attention(*(torch.cat(x, dim=2) for x in (query, key, value)), attention_mask)
        image, text = joint.transpose(1, 2).flatten(2).split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def init_adaln_zero(transformer: SD3Transformer2DModel) -> None:
    """DiT's initialisation (Peebles & Xie 2023, section 3.2): every block begins as the identity; and the mask is used.

    diffusers leaves the modulations at PyTorch's random weights.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "norm" in name or name == "proj_out":
                nn.init.zeros_(module.weight)
    transformer.set_attn_processor(MaskedJointAttention())


def build_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow of 1000 timesteps without a shift, for 16 × 16 latents are small."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def no_third_encoder(width: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 encoder of three tokens and no layers, all of whose states are 0, and its tokenizer."""
    encoder = T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=1, d_ff=1, num_heads=1, num_layers=0))
    nn.init.zeros_(encoder.shared.weight)
    return encoder, T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)


def build_flow_pipeline(model: TextToImageFlow, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The stock pipeline around the networks; it reads a shift of the VAE, which is 0."""
    vae.register_to_config(shift_factor=0.0)
    model.transformer.set_attn_processor(JointAttnProcessor2_0())
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = model.max_tokens
    text_encoder_3, tokenizer_3 = no_third_encoder(model.transformer.config.joint_attention_dim)
    return StableDiffusion3Pipeline(
        transformer=model.transformer, vae=vae, scheduler=build_flow_scheduler(),
        text_encoder=model.text_encoder, tokenizer=tokenizer, text_encoder_2=model.text_encoder_2,
        tokenizer_2=tokenizer, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
    )  # fmt: skip
