"""Small configurations and inputs of the transformers of `others.py`, as diffusers' own tests have them (Apache-2.0).

The numbers of blocks are left out.
"""

import torch
from torch import Tensor

DRAW = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW)


def whole(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=DRAW)


# {class: what it is made of, and what it is called with}
KINDS: dict[str, tuple[dict, dict]] = {
    "AllegroTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, sample_width=8,
             sample_height=8, sample_frames=8, caption_channels=8),
        dict(hidden_states=draw(2, 4, 2, 8, 8), encoder_hidden_states=draw(2, 16, 8),
             timestep=torch.tensor([44, 239])),
    ),
    "AnyFlowFARTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
             ffn_dim=32, rope_max_seq_len=32),
        dict(hidden_states=draw(1, 4, 4, 16, 16), timestep=torch.full((1, 4), 500.0),
             r_timestep=torch.full((1, 4), 250.0), encoder_hidden_states=draw(1, 12, 16),
             chunk_partition=[2, 2]),
    ),
    "AnyFlowTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
             ffn_dim=32, rope_max_seq_len=32),
        dict(hidden_states=draw(1, 2, 4, 16, 16), timestep=torch.full((1, 2), 500.0),
             r_timestep=torch.full((1, 2), 250.0), encoder_hidden_states=draw(1, 12, 16)),
    ),
    "AuraFlowTransformer2DModel": (
        dict(sample_size=32, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
             joint_attention_dim=32, pos_embed_max_size=256),
        dict(hidden_states=draw(2, 4, 32, 32), encoder_hidden_states=draw(2, 256, 32),
             timestep=torch.tensor([44, 239])),
    ),
    "BriaTransformer2DModel": (
        dict(in_channels=4, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
             axes_dims_rope=[0, 4, 4]),
        dict(hidden_states=draw(1, 16, 4), encoder_hidden_states=draw(1, 48, 32), img_ids=draw(16, 3),
             txt_ids=draw(48, 3), timestep=torch.ones(1)),
    ),
    "ChronoEditTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=8, text_dim=32, freq_dim=16, ffn_dim=32,
             rope_max_seq_len=64),
        dict(hidden_states=draw(1, 16, 2, 8, 8), timestep=torch.tensor([44]), encoder_hidden_states=draw(1,
             12, 32)),
    ),
    "CogView3PlusTransformer2DModel": (
        dict(in_channels=4, attention_head_dim=4, num_attention_heads=2, out_channels=4, text_embed_dim=8,
             time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8),
        dict(hidden_states=draw(2, 4, 8, 8), encoder_hidden_states=draw(2, 8, 8),
             original_size=torch.tensor([[64, 64], [64, 64]]), target_size=torch.tensor([[64, 64], [64,
             64]]), crop_coords=torch.tensor([[0, 0], [0, 0]]), timestep=torch.tensor([44, 239])),
    ),
    "CogView4Transformer2DModel": (
        dict(in_channels=4, attention_head_dim=4, num_attention_heads=4, out_channels=4, text_embed_dim=8,
             time_embed_dim=8, condition_dim=4),
        dict(hidden_states=draw(2, 4, 8, 8), encoder_hidden_states=draw(2, 8, 8), timestep=torch.tensor([44,
             239]), original_size=torch.tensor([[64, 64], [64, 64]]), target_size=torch.tensor([[64, 64],
             [64, 64]]), crop_coords=torch.tensor([[0, 0], [0, 0]])),
    ),
    "CosmosTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, mlp_ratio=2,
             text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32)),
        dict(hidden_states=draw(1, 4, 1, 16, 16), timestep=torch.tensor([44]), encoder_hidden_states=draw(1,
             12, 16), attention_mask=torch.ones(1, 12), fps=30, padding_mask=torch.zeros(1, 1, 16, 16)),
    ),
    "DiTTransformer2DModel": (
        dict(out_channels=8, num_attention_heads=2, attention_head_dim=4, num_embeds_ada_norm=8,
             sample_size=8),
        dict(hidden_states=draw(4, 4, 8, 8), timestep=torch.tensor([44, 239, 933, 760]),
             class_labels=torch.tensor([0, 3, 1, 0])),
    ),
    "ErnieImageTransformer2DModel": (
        dict(hidden_size=16, num_attention_heads=1, ffn_hidden_size=16, in_channels=16, out_channels=16,
             text_in_dim=16, rope_axes_dim=(8, 4, 4)),
        dict(hidden_states=draw(1, 16, 16, 16), timestep=torch.ones(1), text_bth=draw(1, 16, 16),
             text_lens=torch.tensor([16])),
    ),
    "Flux2Transformer2DModel": (
        dict(in_channels=4, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
             axes_dims_rope=[4, 4, 4, 4]),
        dict(hidden_states=draw(1, 16, 4), encoder_hidden_states=draw(1, 48, 32), img_ids=whole(1, 16, 4,
             below=4), txt_ids=whole(1, 48, 4, below=48), timestep=torch.ones(1), guidance=torch.ones(1)),
    ),
    "GlmImageTransformer2DModel": (
        dict(in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32,
             time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=64),
        dict(hidden_states=draw(1, 4, 8, 8), encoder_hidden_states=draw(1, 12, 32),
             prior_token_id=torch.tensor([44]), prior_token_drop=torch.tensor([False]),
             timestep=torch.tensor([44]), target_size=torch.full((1, 2), 8.0), crop_coords=torch.zeros(1,
             2)),
    ),
    "HeliosTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
             ffn_dim=32, rope_dim=(4, 4, 4)),
        dict(hidden_states=draw(1, 4, 2, 16, 16), timestep=torch.tensor([44]), encoder_hidden_states=draw(1,
             12, 16), indices_hidden_states=torch.ones(1, 2), indices_latents_history_short=torch.ones(1,
             1), indices_latents_history_mid=torch.ones(1, 1), indices_latents_history_long=torch.ones(1,
             4), latents_history_short=draw(1, 4, 1, 16, 16), latents_history_mid=draw(1, 4, 1, 16, 16),
             latents_history_long=draw(1, 4, 4, 16, 16)),
    ),
    "HunyuanVideo15Transformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
             num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
             rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v"),
        dict(hidden_states=draw(1, 4, 1, 8, 8), timestep=torch.ones(1), encoder_hidden_states=draw(1, 6,
             16), encoder_hidden_states_2=draw(1, 4, 8), encoder_attention_mask=torch.ones(1, 6),
             encoder_attention_mask_2=torch.ones(1, 4), image_embeds=torch.zeros(1, 3, 12)),
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
             num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
             has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
        dict(hidden_states=draw(1, 4, 3, 4, 4), timestep=torch.tensor([44]), encoder_hidden_states=draw(1,
             12, 16), pooled_projections=draw(1, 8), encoder_attention_mask=torch.ones(1, 12),
             guidance=torch.tensor([44]), image_embeds=draw(1, 12, 16), indices_latents=torch.ones(3),
             latents_clean=draw(1, 4, 2, 4, 4), indices_latents_clean=torch.ones(2),
             latents_history_2x=draw(1, 4, 2, 4, 4), indices_latents_history_2x=torch.ones(2),
             latents_history_4x=draw(1, 4, 8, 4, 4), indices_latents_history_4x=torch.ones(8)),
    ),
    "HunyuanVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10,
             num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=8,
             rope_axes_dim=(2, 4, 4)),
        dict(hidden_states=draw(1, 4, 1, 16, 16), timestep=torch.full((1,), 44.0),
             encoder_hidden_states=draw(1, 12, 16), pooled_projections=draw(1, 8),
             encoder_attention_mask=torch.ones(1, 12), guidance=torch.full((1,), 44.0)),
    ),
    "Ideogram4Transformer2DModel": (
        dict(in_channels=16, attention_head_dim=8, num_attention_heads=4, intermediate_size=32,
             adaln_dim=16, llm_features_dim=24, rope_theta=10000, mrope_section=(2, 1, 1)),
        dict(hidden_states=draw(1, 8, 16), encoder_hidden_states=draw(1, 8, 24), timestep=torch.full((1,),
             0.5), position_ids=whole(1, 8, 3, below=65538), segment_ids=torch.ones(1, 8).long(),
             indicator=whole(1, 8, below=4)),
    ),
    "JoyImageEditPlusTransformer3DModel": (
        dict(hidden_size=32, num_attention_heads=2, text_dim=16, rope_dim_list=[4, 6, 6]),
        dict(hidden_states=draw(1, 2, 16, 1, 2, 2), encoder_hidden_states=draw(1, 12, 16),
             timestep=torch.ones(1), shape_list=[[(1, 1, 1), (1, 1, 1)]]),
    ),
    "JoyImageEditTransformer3DModel": (
        dict(hidden_size=32, num_attention_heads=2, text_dim=16, rope_dim_list=[4, 6, 6]),
        dict(hidden_states=draw(1, 16, 1, 4, 4), encoder_hidden_states=draw(1, 12, 16),
             timestep=torch.ones(1)),
    ),
    "Krea2Transformer2DModel": (
        dict(in_channels=16, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
             text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
             num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2)),
        dict(hidden_states=draw(1, 4, 16), encoder_hidden_states=draw(1, 4, 3, 16),
             timestep=torch.full((1,), 0.5), position_ids=draw(8, 3),
             encoder_attention_mask=torch.tensor([[True, True, True, False]])),
    ),
    "LTX2VideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
             cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
             audio_attention_head_dim=4, audio_cross_attention_dim=8, caption_channels=16,
             rope_double_precision=False),
        dict(hidden_states=draw(2, 512, 4), audio_hidden_states=draw(2, 9, 4), encoder_hidden_states=draw(2,
             16, 16), audio_encoder_hidden_states=draw(2, 16, 16), timestep=draw(2),
             encoder_attention_mask=torch.ones(2, 16), num_frames=2, height=16, width=16,
             audio_num_frames=9, fps=25.0),
    ),
    "LTXVideoTransformer3DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
             cross_attention_dim=16, caption_channels=16),
        dict(hidden_states=draw(2, 512, 4), encoder_hidden_states=draw(2, 16, 16),
             timestep=torch.tensor([44, 239]), encoder_attention_mask=torch.ones(2, 16), num_frames=2,
             height=16, width=16),
    ),
    "LongCatAudioDiTTransformer": (
        dict(dit_dim=64, dit_heads=4, dit_text_dim=32, latent_dim=8, text_conv=False),
        dict(hidden_states=draw(1, 16, 8), encoder_hidden_states=draw(1, 10, 32),
             encoder_attention_mask=torch.ones(1, 10), attention_mask=torch.ones(1, 16),
             timestep=torch.ones(1)),
    ),
    "LongCatImageTransformer2DModel": (
        dict(in_channels=4, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
             pooled_projection_dim=32, axes_dims_rope=[4, 4, 8]),
        dict(hidden_states=draw(1, 16, 4), encoder_hidden_states=draw(1, 48, 32), img_ids=draw(16, 3),
             txt_ids=draw(48, 3), timestep=torch.ones(1), guidance=torch.full((1,), 3.5)),
    ),
    "Lumina2Transformer2DModel": (
        dict(sample_size=16, in_channels=4, hidden_size=24, num_refiner_layers=1, num_attention_heads=3,
             num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128),
             cap_feat_dim=32),
        dict(hidden_states=draw(2, 4, 16, 16), encoder_hidden_states=draw(2, 16, 32), timestep=draw(2),
             encoder_attention_mask=torch.ones(2, 16).bool()),
    ),
    "LuminaNextDiT2DModel": (
        dict(sample_size=16, hidden_size=24, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
             learn_sigma=False, cross_attention_dim=32),
        dict(hidden_states=draw(2, 4, 16, 16), encoder_hidden_states=draw(2, 16, 32), timestep=draw(2),
             encoder_mask=draw(2, 16), image_rotary_emb=draw(384, 384, 4), cross_attention_kwargs={}),
    ),
    "MiniMaxH3Transformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=16, hidden_size=24, ffn_dim=32, in_channels=4,
             audio_in_channels=6, text_dim=8, freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16,
             rope_freq_dim=2),
        dict(hidden_states=draw(2, 8, 16), audio_hidden_states=draw(2, 6, 6), encoder_hidden_states=draw(2,
             4, 8), timestep=draw(2), timestep_indices=whole(18, below=2), token_tags=whole(18, below=3),
             position_ids=draw(18, 3), video_indices=whole(8, below=18), audio_indices=torch.tensor([4, 5,
             6, 7, 8, 9]), text_indices=torch.tensor([0, 1, 2, 3])),
    ),
    "MiniMaxMusic3Transformer1DModel": (
        dict(in_channels=8, condition_dim=16, num_attention_heads=2, attention_head_dim=8, ff_inner_dim=32,
             rotary_dim=4, fourier_embedding_dim=8),
        dict(hidden_states=draw(1, 8, 24), encoder_hidden_states=draw(1, 24, 16), timestep=torch.full((1,),
             0.5)),
    ),
    "MochiTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=8, pooled_projection_dim=16, in_channels=4,
             text_embed_dim=16, time_embed_dim=4, max_sequence_length=16),
        dict(hidden_states=draw(2, 4, 2, 16, 16), encoder_hidden_states=draw(2, 16, 16),
             timestep=torch.tensor([44, 239]), encoder_attention_mask=torch.ones(2, 16)),
    ),
    "OmniGenTransformer2DModel": (
        dict(hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32,
             pad_token_id=0, vocab_size=1000, time_step_dim=4, rope_scaling={"long_factor": [1, 2],
             "short_factor": [1, 2]}),
        dict(hidden_states=draw(2, 4, 8, 8), timestep=draw(2), input_ids=whole(2, 24, below=10),
             input_img_latents=[draw(1, 4, 8, 8)], input_image_sizes={0: [[0, 16]]},
             attention_mask=torch.ones(2, 41, 41), position_ids=whole(2, 41, below=41)),
    ),
    "OvisImageTransformer2DModel": (
        dict(in_channels=4, out_channels=4, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=32, axes_dims_rope=(4, 4, 8)),
        dict(hidden_states=draw(1, 16, 4), encoder_hidden_states=draw(1, 48, 32), img_ids=draw(16, 3),
             txt_ids=draw(48, 3), timestep=torch.ones(1)),
    ),
    "PRXTransformer2DModel": (
        dict(context_in_dim=32, hidden_size=32, num_heads=4, axes_dim=[4, 4]),
        dict(hidden_states=draw(1, 16, 16, 16), encoder_hidden_states=draw(1, 16, 32), timestep=torch.ones(1)),
    ),
    "SanaVideoTransformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, num_cross_attention_heads=2,
             cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16, sample_size=8,
             rope_max_seq_len=32),
        dict(hidden_states=draw(1, 16, 2, 16, 16), encoder_hidden_states=draw(1, 12, 16),
             timestep=torch.tensor([44])),
    ),
    "SkyReelsV2Transformer3DModel": (
        dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
             ffn_dim=32, rope_max_seq_len=32),
        dict(hidden_states=draw(1, 4, 2, 16, 16), encoder_hidden_states=draw(1, 12, 16),
             timestep=torch.tensor([44])),
    ),
    "StableAudio3DiTModel": (
        dict(io_channels=8, embed_dim=32, num_heads=4, cond_token_dim=16, global_cond_dim=12,
             local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2, num_memory_tokens=3,
             use_differential_attention=False),
        dict(hidden_states=draw(2, 8, 16), timestep=draw(2), encoder_hidden_states=draw(2, 4, 16),
             global_hidden_states=draw(2, 12)),
    ),
    "ZImageTransformer2DModel": (
        dict(dim=16, n_refiner_layers=1, n_heads=1, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4],
             axes_lens=[256, 32, 32]),
        dict(x=[draw(16, 1, 16, 16)], cap_feats=[draw(16, 16)], t=torch.zeros(1)),
    ),
}  # fmt: skip
