"""The decoder job on a small random Stable Video Diffusion: from first frames to a narrow temporal decoder, which an
export decodes with in chunks of frames, as the stock pipeline does."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLTemporalDecoder, DiffusionPipeline
from omegaconf import OmegaConf

from scripts.random_svd import small_svd_pipeline
from slimstep.eval.export_job import joined
from slimstep.eval.metrics.video import TemporalError
from slimstep.eval.record import read_evaluation
from slimstep.eval.throughput import decoding_rate
from slimstep.models.first_frames import with_video_options
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.models.vae import NarrowAutoencoderKLTemporalDecoder
from slimstep.prune.decoder import choose_channels, pruned_vae, pruned_widths
from tests.jobs import run_job

SMALL = [
    "+experiment=prune_vae", "name=prune_vae", "model=path", "data=shapes_video", "data.pairs.size=24", "scorer=none",
    "train.batch_size=2", "train.learning_rate=3e-3", "latents.count=4", "latents.prompts=4", "latents.steps=1",
    "latents.batch_size=2", "latents.real_share=0.5", "eval.prompts=3", "eval.steps=2", "eval.pictures=2",
    "decoder.batches=[1]", "latency.iterations=2", "latency.warmup=1", "model.video={decode_chunk_size: 2}",
]  # fmt: skip
ELSEWHERE = """
import torch
import PIL.Image
from diffusers import AutoModel, StableVideoDiffusionPipeline
pipe = StableVideoDiffusionPipeline.from_pretrained('export', trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
draw = torch.Generator().manual_seed(0)
frames = pipe(PIL.Image.new('RGB', (16, 16), 'red'), height=16, width=16, num_inference_steps=2, decode_chunk_size=2,
              generator=draw, output_type='pt').frames
assert frames.shape == (1, 3, 3, 16, 16), frames.shape
alone = AutoModel.from_pretrained('export/vae', trust_remote_code=True)
z = torch.randn(3, 4, 8, 8, generator=draw)
with torch.no_grad():
    torch.save([z, alone.decode(z, num_frames=3)[0]], 'decoded.pt')
"""


@pytest.fixture(scope="module")
def teacher():
    return small_svd_pipeline(levels=2, vae_width=64)


def with_narrow_decoder(pipeline, width: float = 0.5):
    widths = pruned_widths(pipeline.vae, width)
    vae = pruned_vae(pipeline.vae, choose_channels(pipeline.vae, widths, "magnitude"), widths)
    return with_unet(pipeline, pipeline.unet, vae=vae)


@pytest.mark.slow
def test_a_temporal_decoder_is_pruned_and_learns_the_teachers_frames(teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "model")
    own = [f"model.name_or_path={tmp_path}/model", f"root={tmp_path}", "train.steps=20", "objective.temporal=0.1"]
    done = run_job(*SMALL, *own)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "prune_vae"
    evaluation = read_evaluation(path)
    wide, pruned, student = evaluation.points
    assert evaluation.facts["widths"] == {"teacher": [64, 64], "student": [32, 32]}
    assert "clip" not in student.metrics and wide.metrics["psnr"] is None
    for prefix in ("", "real_"):
        assert student.mean(f"{prefix}psnr") > pruned.mean(f"{prefix}psnr") + 1
        assert student.mean(f"{prefix}psnr_worst_frame") < student.mean(f"{prefix}psnr")
        assert student.mean(f"{prefix}temporal_error") < pruned.mean(f"{prefix}temporal_error")
    assert student.metrics["motion"]["ratio_to_reference"]["ratio"] > 0
    (row,) = json.loads((path / "vae_ms.json").read_text())["rows"]
    assert row["latent_frames"] == 2 and row["latent_size"] == 8 and row["flop_ratio"] > 3
    assert "flicker, %" in done.stdout and "2 × 8×8" in done.stdout
    assert "PSNR of frames to the teacher decoder's" in (path / "export/README.md").read_text()
    logged = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert {"mse", "temporal"} <= logged[-1].keys()
    loaded = DiffusionPipeline.from_pretrained(path / "export", trust_remote_code=True)
    assert loaded.vae.decoder.conv_in.out_channels == 32
    for key, value in teacher.vae.encoder.state_dict().items():
        assert torch.equal(loaded.vae.encoder.state_dict()[key], value), key
    again = run_job(*SMALL, *own)
    assert again.returncode == 0 and "nothing was made anew" in again.stderr


def test_a_plan_measures_frames_that_are_decoded_together(teacher):
    pipeline = with_video_options(with_unet(teacher, teacher.unet), {"decode_chunk_size": 2})
    run = SimpleNamespace(accelerator=Accelerator(cpu=True))
    job = SimpleNamespace(pipeline=pipeline, unet=pipeline.unet, device=torch.device("cpu"), config=OmegaConf.create(),
                          run=run)  # fmt: skip
    assert decoding_rate(job, SimpleNamespace(batch_size=1)) > 0
    assert not any(parameter.requires_grad for parameter in pipeline.vae.decoder.parameters())


@pytest.mark.slow
def test_an_export_decodes_where_this_project_is_unknown(teacher, tmp_path, elsewhere):
    student = with_narrow_decoder(teacher)
    report = export_pipeline(student, tmp_path / "export")
    assert report.obstacles == ("vae.decoder: its widths (32, 32) are not its encoder's",)
    elsewhere(tmp_path, ELSEWHERE)
    z, decoded = torch.load(tmp_path / "decoded.pt")
    again = load_pipeline(tmp_path / "export").vae
    assert isinstance(again, NarrowAutoencoderKLTemporalDecoder)
    for vae in (student.vae, again):
        with torch.no_grad():
            torch.testing.assert_close(vae.decode(z, num_frames=3)[0], decoded, rtol=0, atol=1e-5)


def test_a_narrow_decoder_goes_into_another_student_and_one_of_full_width_leaves_as_diffusers_own(teacher, tmp_path):
    student = with_narrow_decoder(teacher)
    assert joined(teacher, student, "export.vae=DIR").vae is student.vae
    report = export_pipeline(with_narrow_decoder(teacher, 1.0), tmp_path)
    assert report.is_stock and type(DiffusionPipeline.from_pretrained(tmp_path).vae) is AutoencoderKLTemporalDecoder


@pytest.mark.parametrize(("overrides", "reason"), [
    (["latents.prompts=99"], "latents.prompts=99 first frames were asked for, of videos with captions of their own"),
    (["latents.prompt_file=p.txt"], "latents.prompt_file=p.txt has captions, and this model makes videos of first"),
    (["decoder.width=0.25"], "diffusers makes it of multiples of 32 channels alone: 0.5, 1"),
    (["train.channels_last=true"], "torch has none for the 3-D convolutions of AutoencoderKLTemporalDecoder"),
    (["objective.temporal=1", "model.video={decode_chunk_size: 1}"], "model.video.decode_chunk_size=1 decodes each"),
    (["mixed_precision=bf16"], "convolutions over two frames is garbage in bfloat16 on a CPU"),
    (["data=shapes"], "needs data of videos, not of images"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(overrides, reason, teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "model")
    done = run_job(*SMALL, f"model.name_or_path={tmp_path}/model", f"root={tmp_path}", *overrides)
    assert done.returncode == 1 and reason in done.stderr.splitlines()[-1], done.stderr


def test_flicker_is_what_differs_from_frame_to_frame():
    video = torch.randint(50, 200, (2, 4, 8, 8, 3), dtype=torch.uint8)
    brighter, flickering = video + 10, video.clone()
    flickering[:, ::2] += 51
    metric = TemporalError()
    assert metric(video, (), video).tolist() == metric(brighter, (), video).tolist() == [0, 0]
    torch.testing.assert_close(metric(flickering, (), video), torch.tensor([20.0, 20.0]))
