"""The decoder job from a pipeline to a narrow decoder in an export, on a random model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torchvision.models import VGG16_Weights, vgg16

from slimstep.data.latents import LatentMix
from slimstep.data.prompts import PromptSet
from slimstep.distill.decoder import DecoderDistillation, one_chunk
from slimstep.engine.loop import WEIGHTS
from slimstep.eval.evaluator import place
from slimstep.eval.latents import sampled_latents
from slimstep.eval.record import read_evaluation
from slimstep.eval.sampling import Sampler
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from slimstep.models.vae import NarrowAutoencoderKL
from tests.jobs import run_job
from tests.test_processes import launch
from tests.tiny import slow, tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "+experiment=prune_vae", "data.resolution=16", "data.pairs.size=16", "train.steps=6", "train.batch_size=4",
    "latents.count=8", "latents.prompts=4", "latents.steps=1", "latents.batch_size=4", "eval.prompts=4", "eval.steps=2",
    "eval.pictures=2", "decoder.batches=[1]", "decoder.samples=4", "latency.iterations=2", "latency.warmup=1",
]  # fmt: skip


def run(*overrides):
    return run_job("name=prune_vae", *SMALL, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("runs")
    done = run(*tiny_model, f"root={root}", "train.steps=60", "train.learning_rate=3e-3")
    assert done.returncode == 0, done.stderr
    return root / "prune_vae", done


def test_the_run_holds_what_it_promises(finished):
    path, done = finished
    for name in ("channels.json", f"round-00/{WEIGHTS}", "evaluation.json", "vae_ms.json", "report.html",
                 "export/export_report.json", "report/crops-real.png", "report/crops-sampled.png"):  # fmt: skip
        assert (path / name).is_file(), name
    assert "| student" in done.stdout and "FLOP ratio" in done.stdout
    assert "None of the 4 prompts is among the captions that were trained on." in (path / "report.html").read_text()
    evaluation = json.loads((path / "evaluation.json").read_text())
    assert [point["model"] for point in evaluation["points"]] == ["teacher", "pruned", "student"]
    assert evaluation["facts"]["widths"] == {"teacher": [8, 8], "student": [4, 4]}
    teacher, pruned, student = (point["facts"]["parameters"]["decoder"] for point in evaluation["points"])
    assert student == pruned < 0.35 * teacher
    clip = [point["metrics"]["clip"]["versus_reference"] for point in evaluation["points"]]
    assert clip[0] is None and clip[2]["n"] == 4


def test_training_brings_the_narrow_decoder_nearer(finished):
    _, pruned, student = read_evaluation(finished[0]).points
    assert student.mean("psnr") > pruned.mean("psnr") + 1 and student.mean("real_psnr") > pruned.mean("real_psnr")


def test_the_export_is_the_teacher_around_the_trained_decoder(finished, tiny_pipeline_folder):
    path, _ = finished
    export, teacher = load_pipeline(path / "export"), load_pipeline(tiny_pipeline_folder)
    assert isinstance(export.vae, NarrowAutoencoderKL)
    own, stock = export.vae.state_dict(), teacher.vae.state_dict()
    for key, value in stock.items():
        if not key.startswith("decoder."):
            assert torch.equal(own[key], value), key
    for key, value in teacher.unet.state_dict().items():
        assert torch.equal(export.unet.state_dict()[key], value), key
    loaded = DiffusionPipeline.from_pretrained(path / "export", trust_remote_code=True)
    assert loaded.vae.decoder.conv_in.out_channels == 4


def test_a_finished_run_makes_nothing_anew(finished, tiny_model):
    path, _ = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.json")}
    job = [*tiny_model, f"root={path.parent}", "train.steps=60", "train.learning_rate=3e-3"]
    again = run(*job)
    assert again.returncode == 0 and "nothing was made anew" in again.stderr
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.json")} == before


def test_a_plan_tells_what_would_be_made_and_writes_nothing(tmp_path, tiny_model):
    plan = run(*tiny_model, f"root={tmp_path}", "plan=true", "latents.rounds=2")
    assert plan.returncode == 0, plan.stderr
    assert "(4, 4) channels, by magnitude" in plan.stdout and "8 sampled latents and 0 images" in plan.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides",
    [
        ["latents.rounds=2", "latents.real_share=0.5", "decoder.importance=taylor", "objective.l1=0.5"],
        *slow(
            ["latents.real_share=1", "decoder.importance=activation_energy", "objective.gradient=0.3",
             "mixed_precision=bf16"],
            ["train.channels_last=true", "train.gradient_checkpointing=true", "decoder.norm_groups=per_group"],
        ),
    ],
    ids=["rounds, mixed", "real, bf16", "channels_last"],
)
def test_other_ways_to_train_it(tmp_path, tiny_model, overrides):
    done = run(*tiny_model, f"root={tmp_path}", *overrides)
    assert done.returncode == 0, done.stderr
    rounds = 2 if "latents.rounds=2" in overrides else 1
    assert len(list((tmp_path / "prune_vae").glob(f"round-*/{WEIGHTS}"))) == rounds
    metrics = [json.loads(line) for line in (tmp_path / "prune_vae/metrics.jsonl").read_text().splitlines()]
    named = {name for name in ("l1", "gradient") if any(f"objective.{name}" in word for word in overrides)}
    assert named | {"mse"} == metrics[-1].keys() & {"mse", "l1", "gradient", "lpips"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["decoder.width=0.3"],
            "width=0.3 is impossible at level 0: its 8 channels .* whole groups stay or go: 0.25, 0.5, 0.75, 1",
        ),
        (["decoder.width=half"], "decoder.width=half must be a share"),
        (["decoder.width=[0.5]"], r"decoder.width=\[0.5\] has 1 values; this decoder has 2 levels: \(8, 8\)"),
        (["decoder.norm_groups=half"], "decoder.norm_groups='half' is unknown; choose from"),
        (["latency.iterations=1"], "latency.iterations=1: a ratio needs quartiles"),
        (["latents.steps=0"], "latents: steps=0 must be at least 1"),
        (["decoder.importance=best"], "decoder.importance='best' is unknown; choose from"),
        (["objective.mse=0"], "all of mse, l1, gradient, lpips and temporal are 0"),
        (["objective.mse=-1"], "objective.mse=-1 must be at least 0"),
        (["objective.temporal=1"], "objective.temporal=1 compares neighbouring frames, and a decoder of images"),
        (["objective.lpips=1"], "objective.lpips needs VGG-16's weights: put https://.*vgg16"),
        (["latents.real_share=2"], "latents.real_share=2.0 must lie between 0 and 1"),
        (["latents.count=0"], "latents: count=0 must be at least 1"),
        (["latents.prompts=99"], "99 prompts were asked for, the 16 pairs have"),
        (["latents.prompt_file=/nowhere.txt"], "/nowhere.txt does not exist"),
        (["decoder.batches=[0]"], r"decoder.batches=\[0\] must be a list of numbers from 1 up"),
        (["model.name_or_path={narrow}"], "the model's VAE is NarrowAutoencoderKL"),
    ],
)
def test_mistakes_end_in_a_line_before_anything_is_made(overrides, message, finished, leave, tiny_model, tmp_path):
    overrides = [word.format(narrow=finished[0] / "export") if "{narrow}" in word else word for word in overrides]
    code, stderr = leave(*SMALL, *tiny_model, *overrides)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and re.search(message, lines[0]), stderr
    assert not list((tmp_path / "runs").glob("prune_vae/round-*"))


# ---- the parts


class Plain(torch.nn.Module):
    """Latents are images; narrow ones come out darker."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, latents):
        return self.scale * latents


def test_the_losses_are_what_their_names_say():
    x = torch.rand(2, 3, 8, 8) - 0.5
    for weights, expected in (
        ({"mse": 1}, (0.5 * x).square().mean()),
        ({"mse": 0, "l1": 2}, 2 * (0.5 * x).abs().mean()),
        ({"mse": 0, "gradient": 1}, 0.5 * (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean())),
        ({"mse": 1, "l1": 1}, (0.5 * x).square().mean() + (0.5 * x).abs().mean()),
    ):
        loss, metrics = DecoderDistillation(Plain(), **weights)(Plain(0.5), {"latents": x}, None)
        torch.testing.assert_close(loss, expected)
        assert set(metrics) == {name for name, weight in weights.items() if weight}


def test_videos_are_learned_in_the_chunks_in_which_they_are_decoded():
    z, draw = torch.arange(25.0)[None, None, :, None, None], torch.Generator().manual_seed(0)
    starts = {tuple(one_chunk(z, 8, draw).flatten().tolist()) for _ in range(64)}
    assert starts == {tuple(range(start, start + 8)) for start in (0, 8, 16, 17)}
    for frames_at_once in (None, 40):
        assert torch.equal(one_chunk(z, frames_at_once, draw), z)


@pytest.mark.slow
def test_lpips_is_learned_from_where_its_weights_are(tmp_path, monkeypatch):
    """VGG-16's file with random weights in torch's cache; a picture is at distance zero of itself alone."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name
    file.parent.mkdir(parents=True)
    torch.save(vgg16(weights=None).state_dict(), file)
    objective, x = DecoderDistillation(Plain(), mse=0, lpips=1), torch.rand(1, 3, 64, 64) - 0.5
    same, _ = objective(Plain(), {"latents": x}, None)
    student = Plain(0.5)
    other, _ = objective(student, {"latents": x}, None)
    other.backward()
    assert same == 0 and other > 1e-4 and student.scale.grad.abs() > 0


def test_a_mix_takes_as_many_of_each_as_asked_for_and_repeats_real_ones_where_they_are_short():
    sampled = [{"latents": torch.full((1,), float(i))} for i in range(4)]
    real = [{"latents": torch.full((1,), 100.0 + i)} for i in range(2)]
    mix = LatentMix(sampled, 3, real, 3)
    assert [mix[i]["latents"].item() for i in range(len(mix))] == [0, 1, 2, 100, 101, 100]
    assert [LatentMix((), 0, real, 2)[i]["latents"].item() for i in range(2)] == [100, 101]


def test_a_latent_is_a_function_of_its_index_and_more_of_them_add_to_the_cache(tmp_path):
    pipeline, prompts = tiny_pipeline("v_prediction"), PromptSet(("a", "b", "c"), "letters")
    sampler, accelerator = Sampler(pipeline, 2, 2.0), Accelerator(cpu=True)

    def ask(count, folder):
        return sampled_latents(sampler, pipeline.unet, prompts, count, 4, tmp_path / folder, accelerator)

    few = ask(6, "one")
    files = {path: path.stat().st_mtime_ns for path in few.folder.glob("*.safetensors")}
    more, anew = ask(12, "one"), ask(12, "two")
    assert more.folder == few.folder and len(few) == 8 and len(more) == 12
    assert {path: path.stat().st_mtime_ns for path in files} == files, "what was there was made again"
    for i in range(12):
        assert torch.equal(more[i]["latents"], anew[i]["latents"])
    assert not torch.equal(more[0]["latents"], more[3]["latents"]), "the same prompt, another noise"


@pytest.mark.slow
def test_latents_are_found_again_by_another_process(tmp_path):
    """Diffusers writes what a config leaves open in the order of a set: it is no part of the cache's key."""
    program = (
        "import sys; from pathlib import Path; from accelerate import Accelerator\n"
        "from diffusers import DDIMScheduler; from slimstep.data.prompts import PromptSet\n"
        "from slimstep.eval.latents import sampled_latents; from slimstep.eval.sampling import Sampler\n"
        "from tests.tiny import tiny_pipeline; pipeline = tiny_pipeline()\n"
        "pipeline.scheduler = DDIMScheduler.from_config({'beta_start': 0.001, 'prediction_type': 'v_prediction'})\n"
        "sampler, prompts = Sampler(pipeline, 1, 1.0), PromptSet(('a',), 'one')\n"
        "sampled_latents(sampler, pipeline.unet, prompts, 1, 1, Path(sys.argv[1]), Accelerator(cpu=True))\n"
    )
    for seed in "12":
        command = [sys.executable, "-c", program, str(tmp_path)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed})
    assert len(list(tmp_path.glob("latents-*"))) == 1


def test_a_pruned_decoder_is_not_pruned_again_but_its_unet_is_and_is_distilled(finished, tiny_model, tmp_path):
    """The export is a teacher like any other: its UNet goes through the other jobs' loading and exporting."""
    pipeline = load_pipeline(finished[0] / "export")
    pruned = pipeline.unet.with_architecture({"mid_block.attentions.0": 0})
    export_pipeline(with_unet(pipeline, pruned), tmp_path / "both")
    both = load_pipeline(tmp_path / "both")
    assert isinstance(both.vae, NarrowAutoencoderKL) and both.unet.config.depths == {"mid_block.attentions.0": 0}


@pytest.mark.slow
def test_two_processes_evaluate_and_sample_as_one_does(tmp_path, tiny_model):
    job = [*SMALL, *tiny_model]
    one = launch(1, tmp_path / "one", *job)
    there = tmp_path / "two/prune_vae/round-00"
    there.mkdir(parents=True)
    shutil.copy(one / "round-00" / WEIGHTS, there)  # the same decoder to judge
    two = launch(2, tmp_path / "two", *job)
    artifacts = [
        "channels.json",
        "heldout.safetensors",
        *(place(name, 2, 2.5) for name in ("teacher", "pruned", "student")),
    ]
    for artifact in artifacts:
        assert (two / artifact).read_bytes() == (one / artifact).read_bytes(), artifact
