"""The decoders of CogVideoX and Wan: pruned by channels, trained from the first frame on, and decoded by diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from torch import nn

from scripts.random_transformers import small_cogvideox_pipeline, small_wan_pipeline
from slimstep.eval.record import read_evaluation
from slimstep.models.autoencoder import vae_obstacles
from slimstep.models.decoding import decoder_of, latent_channels, scaling_of
from slimstep.models.vae import NarrowAutoencoderKLCogVideoX
from slimstep.prune.decoder import all_groups, choose_channels, name_of, pruned_vae, pruned_widths, traced, writers
from tests.jobs import run_job
from tests.tiny import write_tiny_clip

PIPELINES = {"CogVideoX": small_cogvideox_pipeline, "Wan": small_wan_pipeline}
SMALL = [
    "+experiment=prune_vae", "name=prune_vae", "model=path", "data=shapes_video", "data.pairs.size=24",
    "train.batch_size=2", "train.learning_rate=3e-3", "latents.count=4", "latents.prompts=4", "latents.steps=1",
    "latents.batch_size=2", "latents.real_share=0.5", "eval.prompts=3", "eval.steps=2", "eval.pictures=2",
    "decoder.batches=[1]", "latency.iterations=2", "latency.warmup=1",
]  # fmt: skip


@pytest.fixture(params=["CogVideoX", "Wan"])
def family(request) -> str:
    return request.param


@pytest.fixture(params=["CogVideoX", "Wan", "Wan in patches"])
def vae(request):
    kind, _, in_patches = request.param.partition(" in ")
    vae = PIPELINES[kind]().vae
    if in_patches:
        torch.manual_seed(6)
        vae = AutoencoderKLWan.from_config({**vae.config, "patch_size": 2, "in_channels": 12, "out_channels": 12})
    return vae.eval()


def latents_of(vae, count: int) -> torch.Tensor:
    return torch.randn(2, latent_channels(vae), count, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_decoders_give_diffusers_frames_with_and_without_a_gradient(count, vae):
    z, whole = latents_of(vae, count), decoder_of(vae)
    with torch.no_grad():
        expected, found = vae.decode(z / scaling_of(vae)).sample, whole(z)
    for frames in (found, whole(z)):
        frames = frames.clamp(-1, 1) if isinstance(vae, AutoencoderKLWan) else frames
        torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)
    whole.enable_gradient_checkpointing()
    saved = whole(z)
    torch.testing.assert_close(saved, found, rtol=0, atol=1e-5)
    saved.square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in whole.decoder.named_parameters()
               if "time_conv" not in name or count > 1)  # fmt: skip


def silence(layer: nn.Module, kept: list[int]) -> None:
    """Sets the outputs of a convolution to zero, but for those that are kept."""
    gone = [c for c in range(layer.out_channels) if c not in kept]
    with torch.no_grad():
        layer.weight[gone] = 0
        layer.bias[gone] = 0


def test_a_pruned_decoder_of_cogvideox_is_the_teachers_without_the_other_channels():
    """Whole groups of norms go, so that the others' statistics stay."""
    vae = small_cogvideox_pipeline().vae.eval()
    widths = pruned_widths(vae, 0.5)
    channels = choose_channels(vae, widths, "magnitude")
    pruned, z = pruned_vae(vae, channels, widths), latents_of(vae, 5)
    assert isinstance(pruned, NarrowAutoencoderKLCogVideoX) and pruned.decoder.conv_in.conv.out_channels == widths[-1]
    masked, graph = traced(vae)
    groups = {name_of(masked, group): group for group in all_groups(graph, masked)}
    assert groups.keys() == channels.keys()
    for name, group in groups.items():
        for layer in writers(group):
            silence(layer, channels[name])
    whole, narrow = decoder_of(vae), decoder_of(pruned)
    whole.decoder = masked
    torch.testing.assert_close(narrow(z), whole(z), rtol=0, atol=1e-4)


def test_a_pruned_decoder_of_wan_is_diffusers_own_class():
    vae = small_wan_pipeline().vae.eval()
    widths = pruned_widths(vae, 0.75)
    channels = choose_channels(vae, widths, "activation_energy", latents_of(vae, 3))
    pruned = pruned_vae(vae, channels, widths)
    assert type(pruned) is AutoencoderKLWan and pruned.config.decoder_base_dim == 6 and not vae_obstacles(pruned)
    block, own = vae.decoder.up_blocks[0], pruned.decoder.up_blocks[0]
    stream = channels["up_blocks.0.upsamplers.0.odd"]
    both = [*stream, *(8 + c for c in stream)]
    weight = block.upsamplers[0].time_conv.weight[both][:, stream]
    assert torch.equal(own.upsamplers[0].time_conv.weight, weight)
    inner = channels["mid_block.attentions.0.to_k"]
    values = vae.decoder.mid_block.attentions[0].to_qkv.weight[16:][inner][:, stream]
    assert torch.equal(pruned.decoder.mid_block.attentions[0].to_qkv.weight[12:], values)
    whole = pruned_vae(vae, choose_channels(vae, pruned_widths(vae, 1.0), "first"), pruned_widths(vae, 1.0))
    z = latents_of(vae, 3)
    assert torch.equal(whole.decode(z).sample, vae.decode(z).sample)
    for name, parameter in vae.encoder.named_parameters():
        assert torch.equal(pruned.encoder.get_parameter(name), parameter)


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random"])
def test_every_criterion_chooses_channels(importance, vae):
    widths = pruned_widths(vae, 0.5)
    channels = choose_channels(vae, widths, importance, latents_of(vae, 2))
    assert {len(kept) for kept in channels.values()} <= {2, 4}
    z = latents_of(vae, 3)
    assert pruned_vae(vae, channels, widths).decode(z).sample.shape == vae.decode(z).sample.shape


def test_widths_that_diffusers_cannot_express_are_refused():
    wan, cogvideox = small_wan_pipeline().vae, small_cogvideox_pipeline().vae
    with pytest.raises(ValueError, match="Wan's decoder has one number for all levels"):
        pruned_widths(wan, [0.5, 0.5, 1.0])
    with pytest.raises(ValueError, match="decoder.width=0.6 is impossible: 8 channels become a whole .* 0.25, 0.5"):
        pruned_widths(wan, 0.6)
    cogvideox.register_to_config(block_out_channels=(8, 16, 16))
    with pytest.raises(ValueError, match="levels 0 and 1 would both have 8 channels"):
        pruned_widths(cogvideox, [1.0, 0.5, 0.5])
    wan.register_to_config(is_residual=True)
    with pytest.raises(ValueError, match="as of Wan 2.2: its decoder is of another kind"):
        pruned_widths(wan, 0.5)


@pytest.mark.slow
def test_a_causal_decoder_is_pruned_and_learns_the_teachers_frames(family, tmp_path):
    PIPELINES[family]().save_pretrained(tmp_path / "model")
    (tmp_path / "clip").mkdir()
    write_tiny_clip(tmp_path / "clip")
    scorer = [f"scorer.model=local-dir:{tmp_path}/clip", "scorer.pretrained=null", "scorer.force=true"]
    own = [f"model.name_or_path={tmp_path}/model", f"root={tmp_path}", "train.steps=20", "objective.temporal=0.1",
           "data.frames=17", "decoder.frames=9", "train.gradient_checkpointing=true", "scorer=openclip"]  # fmt: skip
    own += scorer
    done = run_job(*SMALL, *own)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "prune_vae"
    evaluation = read_evaluation(path)
    _, pruned, student = evaluation.points
    assert evaluation.facts["widths"] == {"teacher": [8, 8, 8], "student": [4, 4, 4]}
    for prefix in ("", "real_"):
        assert student.mean(f"{prefix}psnr") > pruned.mean(f"{prefix}psnr")
    (row,) = json.loads((path / "vae_ms.json").read_text())["rows"]
    assert row["latent_frames"] == 3 and row["flop_ratio"] > 2 and "3 × 4×4" in done.stdout
    assert "[4, 4, 4] channels per level" in (path / "export/README.md").read_text()
    is_stock = json.loads((path / "export/export_report.json").read_text())["is_stock"]
    assert is_stock == (family == "Wan")
    check_export(path / "export", is_stock)


def check_export(folder: Path, is_stock: bool) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=not is_stock)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_frames": 9}
    assert pipeline("a b", num_inference_steps=2, output_type="np", **size).frames.shape == (1, 9, 16, 16, 3)


@pytest.mark.parametrize(("overrides", "reason"), [
    (["decoder.frames=8"], "videos of 8 frames do not fit this pipeline"),
    (["decoder.frames=17"], "decoder.frames=17 must be more than 1, an image, and at most the 9 that the model makes"),
    (["decoder.frames=1"], "must be more than 1"),
])  # fmt: skip
def test_frames_that_no_decoder_learns_from_are_refused(overrides, reason, leave, tmp_path):
    small_wan_pipeline().save_pretrained(tmp_path / "model")
    code, error = leave(*SMALL, f"model.name_or_path={tmp_path}/model", f"root={tmp_path}", *overrides)
    assert code == 1 and reason in error
