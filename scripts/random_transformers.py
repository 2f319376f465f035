"""Small random transformers in pipelines of their own, built offline."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from scripts.tiny_tokenizer import MAX_TOKENS, tiny_tokenizer

TEXT_WIDTH, POOLED = 16, 8


def small_vae(**fields) -> AutoencoderKL:
    """16×16 images, 8×8 latents of 4 channels, with a shift."""
    fields = {"latent_channels": 4, "scaling_factor": 1.5, "shift_factor": 0.1, **fields}
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8), sample_size=16, norm_num_groups=4, layers_per_block=1, use_quant_conv=False,
        use_post_quant_conv=False, **levels, **fields,
    ).eval()  # fmt: skip


def small_clip(seed: int, kind: type = CLIPTextModelWithProjection):
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH // 2, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=MAX_TOKENS, projection_dim=POOLED // 2, **special,
    )  # fmt: skip
    return kind(config).eval()


def alive(network: torch.nn.Module) -> torch.nn.Module:
    """The network with random biases and embeddings, too: gates and tables that start at zero would hide blocks."""
    draw = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return network.eval()


def small_sd3(num_layers: int = 5, **fields) -> SD3Transformer2DModel:
    """8×8 latents in 16 tokens. `dual_attention_layers` and `qk_norm` make it one of version 3.5."""
    torch.manual_seed(0)
    return alive(SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=num_layers, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=16, pooled_projection_dim=POOLED, out_channels=4,
        pos_embed_max_size=8, **fields,
    ))  # fmt: skip


def small_sd3_pipeline(transformer: SD3Transformer2DModel | None = None, **scheduler) -> StableDiffusion3Pipeline:
    """Two CLIPs and no T5, 16×16 images; equal weights at every call."""
    scheduler = FlowMatchEulerDiscreteScheduler(**(scheduler or {"shift": 3.0}))
    torch.manual_seed(2)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer or small_sd3(), scheduler=scheduler, vae=small_vae(), text_encoder=small_clip(3),
        tokenizer=tiny_tokenizer(), text_encoder_2=small_clip(4), tokenizer_2=tiny_tokenizer("!"), text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_t5() -> T5EncoderModel:
    torch.manual_seed(5)
    config = T5Config(vocab_size=len(tiny_tokenizer()), d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def small_pixart(num_layers: int = 4, **fields) -> PixArtTransformer2DModel:
    """8×8 latents in 16 tokens."""
    torch.manual_seed(0)
    fields = {"sample_size": 8, **fields}
    return alive(PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=num_layers,
        cross_attention_dim=16, caption_channels=TEXT_WIDTH, patch_size=2, **fields,
    ))  # fmt: skip


def small_pixart_pipeline(kind: type = PixArtSigmaPipeline, **fields) -> PixArtSigmaPipeline | PixArtAlphaPipeline:
    torch.manual_seed(2)
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    pipeline = kind(
        tokenizer=tiny_tokenizer(), text_encoder=small_t5(), vae=small_vae(shift_factor=None), scheduler=scheduler,
        transformer=small_pixart(**fields),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_flux(guidance_embeds: bool = False) -> FluxTransformer2DModel:
    """8×8 latents in 16 tokens; three double blocks and two single ones."""
    torch.manual_seed(0)
    return alive(FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH // 2, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 2, 2),
    ))  # fmt: skip


def small_flux_pipeline(guidance_embeds: bool = False, **scheduler) -> FluxPipeline:
    torch.manual_seed(2)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), transformer=small_flux(guidance_embeds),
        vae=small_vae(), text_encoder=small_clip(3, CLIPTextModel), tokenizer=tiny_tokenizer(),
        text_encoder_2=small_t5(), tokenizer_2=tiny_tokenizer("!"),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_gemma() -> tuple[GemmaTokenizer, Gemma2Model]:
    """Reads single characters; bytes of others."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(ord("!"), ord("~") + 1))]
    tokenizer = GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    torch.manual_seed(6)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return tokenizer, Gemma2Model(config).eval()


def small_sana(num_layers: int = 4, **fields) -> SanaTransformer2DModel:
    """8×8 latents in 64 tokens."""
    torch.manual_seed(0)
    return alive(SanaTransformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=num_layers, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=TEXT_WIDTH, **fields,
    ))  # fmt: skip


def small_sana_pipeline(scheduler: SchedulerMixin | None = None, **fields) -> SanaPipeline:
    """The solver is the published one's: 32×32 images, the least that it takes, and 8×8 latents."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    tokenizer, text_encoder = small_gemma()
    torch.manual_seed(2)
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3, encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)), encoder_layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3,
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41,
    )  # fmt: skip
    pipeline = SanaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae.eval(), transformer=small_sana(**fields),
        scheduler=scheduler or DPMSolverMultistepScheduler(**flow),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_qwen() -> tuple[Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration]:
    """Reads bytes."""
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    torch.manual_seed(7)
    text = {
        "hidden_size": TEXT_WIDTH, "intermediate_size": TEXT_WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"},
        "vocab_size": len(tokenizer),
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_start_token_id=1, vision_token_id=2,
                              image_token_id=3, video_token_id=4)  # fmt: skip
    return tokenizer, Qwen2_5_VLForConditionalGeneration(config).eval()


def small_qwen_image(num_layers: int = 4, **fields) -> QwenImageTransformer2DModel:
    """8×8 latents in 16 tokens."""
    torch.manual_seed(0)
    return alive(QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=num_layers, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=TEXT_WIDTH, axes_dims_rope=(4, 2, 2), **fields,
    ))  # fmt: skip


def small_qwen_image_pipeline(**scheduler) -> QwenImagePipeline:
    """16×16 images, 8×8 latents with a mean and a deviation of their own in each of 4 channels."""
    tokenizer, text_encoder = small_qwen()
    torch.manual_seed(2)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.1],
    )  # fmt: skip
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), vae=vae.eval(), text_encoder=text_encoder,
        tokenizer=tokenizer, transformer=small_qwen_image(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Of CogVideoX 5B and 1.5 that begin with a frame, as their published configurations have it.
FIRST_FRAME = {"in_channels": 8, "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
OF_15 = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "sample_width": 8, "sample_height": 8}
FIRST_FRAME_15 = {**OF_15, "in_channels": 8, "ofs_embed_dim": 16}


def small_cogvideox(num_layers: int = 4, **fields) -> CogVideoXTransformer3DModel:
    """3×4×4 latents in 12 tokens, for videos of 9 frames. `use_rotary_positional_embeddings` makes it one of 5B, and 8
    `in_channels` one of first frames."""
    torch.manual_seed(0)
    fields = {"sample_frames": 9, "attention_head_dim": 16, "in_channels": 4, "sample_width": 4, "sample_height": 4,
              **fields}  # fmt: skip
    return alive(CogVideoXTransformer3DModel(
        num_attention_heads=2, out_channels=4, time_embed_dim=16, text_embed_dim=TEXT_WIDTH,
        num_layers=num_layers, **fields,
    ))  # fmt: skip


def small_cogvideox_pipeline(
    scheduler: SchedulerMixin | None = None, **fields
) -> CogVideoXPipeline | CogVideoXImageToVideoPipeline:
    """Videos of 16×16 pixels; the scheduler is the published one's. With FIRST_FRAME or FIRST_FRAME_15 it is one of
    first frames."""
    takes_frame = fields.get("in_channels") == 8
    torch.manual_seed(2)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3, latent_channels=4,
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
        sample_height=16, sample_width=16, scaling_factor=0.7, invert_scale_latents=takes_frame,
    )  # fmt: skip
    published = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": True,
        "snr_shift_scale": 3.0, "timestep_spacing": "linspace",
    }  # fmt: skip
    pipeline = (CogVideoXImageToVideoPipeline if takes_frame else CogVideoXPipeline)(
        tokenizer=tiny_tokenizer(), text_encoder=small_t5(), vae=vae.eval(), transformer=small_cogvideox(**fields),
        scheduler=scheduler or CogVideoXDDIMScheduler(**published),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_wan(num_layers: int = 4, **fields) -> WanTransformer3DModel:
    """3×4×4 latents in 12 tokens, for videos of 9 frames; the width of a head that holds three axes."""
    torch.manual_seed(0)
    network = alive(WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=TEXT_WIDTH, freq_dim=16,
        ffn_dim=32, num_layers=num_layers, rope_max_seq_len=32, **fields,
    ))  # fmt: skip
    network.register_to_config(sample_size=4, sample_frames=9, temporal_compression_ratio=4)
    return network


def small_wan_pipeline(scheduler: SchedulerMixin | None = None, **fields) -> WanPipeline:
    """Videos of 16×16 pixels; the solver is the published one's."""
    torch.manual_seed(5)
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tiny_tokenizer()), **sizes)).eval()
    torch.manual_seed(2)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.1], scale_factor_spatial=4,
    )  # fmt: skip
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    pipeline = WanPipeline(
        tokenizer=tiny_tokenizer(), text_encoder=text_encoder, vae=vae.eval(), transformer=small_wan(**fields),
        scheduler=scheduler or UniPCMultistepScheduler(**flow),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
