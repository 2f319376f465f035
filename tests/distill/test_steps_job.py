"""The distilling job from a teacher to students that stock diffusers samples, on a random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from slimstep.eval.pages.few_step import write_few_step
from slimstep.eval.pages.steps_page import error_ratio
from slimstep.eval.record import read_evaluation
from slimstep.eval.sampling import Sampler
from slimstep.models.card import origin_of
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from tests.jobs import run_job
from tests.tiny import tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "+experiment=distill_steps", "data.resolution=16", "data.pairs.size=16", "train.steps=3", "train.batch_size=4",
    "recovery.train.steps=2", "recovery.train.batch_size=4",
    "v_prediction.train.steps=2", "v_prediction.train.batch_size=4",
    "eval.prompts=4", "eval.pictures=2", "evaluation.real_images=8", "curves.steps=[1,2]", "curves.guidance=[2.5]",
]  # fmt: skip
STEPS = ["distillation.steps=[4,2,1]", "distillation.stages={steps-1: {train: {steps: 2}}}"]

DIVERSITY = ["evaluation.diversity_prompts=2", "evaluation.diversity_seeds=2"]


def run(*overrides):
    return run_job("name=distill_steps", *SMALL, *overrides)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The random teacher, ε-predicting, and a student of it with fewer blocks, both as diffusers folders."""
    folder = tmp_path_factory.mktemp("pruned")
    tiny_pipeline("epsilon").save_pretrained(folder / "teacher")
    teacher = load_pipeline(folder / "teacher")
    student = teacher.unet.with_architecture({"mid_block.attentions.0": 0})
    export_pipeline(with_unet(teacher, student), folder / "student")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("runs")
    done = run(*tiny_model, f"root={root}", *STEPS, *DIVERSITY, "tracker=tensorboard")
    assert done.returncode == 0, done.stderr
    return root / "distill_steps", done


def test_the_tracker_gets_the_curves_and_the_pictures(finished):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path, _ = finished
    (file,) = path.glob("**/events.out.tfevents.*")
    events = reader.EventAccumulator(str(file))
    events.Reload()
    assert "report/clip-against-steps" in events.Tags()["images"]
    assert "curves/text_summary" in events.Tags()["tensors"]


def test_every_student_is_a_stock_pipeline_that_draws_what_we_evaluated(finished):
    path, _ = finished
    for name, steps in (("steps-2", 2), ("steps-1", 1)):
        stock = StableDiffusionPipeline.from_pretrained(path / name / "export")
        stock.set_progress_bar_config(disable=True)
        config = stock.scheduler.config
        assert isinstance(stock.scheduler, DDIMScheduler) and config.timestep_spacing == "trailing"
        sampler = Sampler(load_pipeline(path / name / "export"), steps, 2.5)
        noise = torch.stack([sampler.noise(i) for i in range(2)])
        theirs = stock(prompt=["a", "b"], latents=noise, num_inference_steps=steps, guidance_scale=2.5,
                       output_type="latent").images  # fmt: skip
        ours = sampler.latents(sampler.pipeline.unet, sampler.encode(["a", "b"]), noise)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_evaluation_holds_every_point_paired_with_the_teacher(finished):
    path, done = finished
    points = read_evaluation(path).points
    evaluated = {(model, steps) for model in ("teacher", "teacher-dpm", "steps-2", "steps-1") for steps in (1, 2)}
    assert {(p.model, p.steps) for p in points} == {*evaluated, ("teacher", 4)}
    reference = next(p for p in points if p.model == "teacher" and p.steps == 4)
    assert reference.mean("latent_error") is None and reference.versus_reference is None
    assert all(p.mean("latent_error") > 0 and p.versus_reference["n"] == 4 for p in points if p is not reference)
    assert {p.facts["evaluations"] for p in points} == {2, 4, 8}
    student, ddim = (next(p for p in points if p.model == model and p.steps == 2) for model in ("steps-2", "teacher"))
    ratio = student.mean("latent_error") / ddim.mean("latent_error")
    assert error_ratio(student, ddim)["ratio"] == pytest.approx(ratio) and error_ratio(reference, reference) is None
    assert "| steps-1 " in done.stdout
    page = (path / "report.html").read_text()
    assert "None of the 4 prompts is among the captions that were trained on." in page
    assert "none of the 4 prompts of the evaluation is trained on" in done.stderr
    assert page.count("<svg") == 4 and "teacher, DPM++ 2M" in page and "steps-1" in page
    assert {file.stem for file in (path / "report").iterdir()} == {
        "clip-against-steps", "clip-against-time", "distance-against-steps", "images-guidance-2.5"
    }  # fmt: skip


def test_every_point_has_a_diversity_in_units_of_the_teachers(finished):
    path, _ = finished
    points = [p for p in read_evaluation(path).points if p.steps > 1]
    (teacher,) = (p.metrics["diversity"] for p in points if p.model == "teacher" and p.steps == 4)
    assert teacher["n"] == teacher["seeds"] == 2 and teacher["ratio_to_reference"] is None
    for own in (p.metrics["diversity"] for p in points):
        assert own is teacher or own["ratio_to_reference"]["ratio"] == pytest.approx(own["mean"] / teacher["mean"])
    assert "diversity over the reference&#39;s" in (path / "report.html").read_text()


def test_a_stage_has_its_own_training(finished):
    path, _ = finished
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"]: line["step"] for line in lines} == {"steps-2": 3, "steps-1": 2}


def test_a_finished_distillation_makes_nothing_anew(finished, tiny_model):
    path, first = finished
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    again = run(*tiny_model, f"root={path.parent}", *STEPS, *DIVERSITY, "tracker=tensorboard")
    assert again.returncode == 0 and again.stdout == first.stdout, again.stderr
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_a_distillation_grows_and_what_is_there_is_not_made_again(tmp_path, tiny_model):
    path, job = tmp_path / "distill_steps", [*tiny_model, f"root={tmp_path}"]
    assert run(*job, "distillation.steps=[4,2]", "curves.steps=[2]").returncode == 0
    kept = ["steps-2/weights.safetensors", "evaluation/teacher/guidance-2.5-steps-4.json",
            "reference/guidance-2.5.safetensors"]  # fmt: skip
    before = [(path / name).stat().st_mtime_ns for name in kept]
    grown = run(*job, "distillation.steps=[4,2,1]", "curves.steps=[2,1]")
    assert grown.returncode == 0, grown.stderr
    assert [(path / name).stat().st_mtime_ns for name in kept] == before
    points = json.loads((path / "evaluation.json").read_text())["points"]
    assert {"steps-2", "steps-1"} <= {p["model"] for p in points} and "steps-1" in (path / "report.html").read_text()
    refused = run(*job, "distillation.steps=[4,2]", "curves.steps=[2,1]")
    assert refused.returncode == 1 and "distillation.steps: [4, 2, 1] there, [4, 2] now" in refused.stderr


@pytest.mark.slow
def test_a_pruned_student_of_an_epsilon_teacher_is_converted_to_v_recovered_and_distilled(tmp_path, pruned, tiny_model):
    model = [*tiny_model, f"model.name_or_path={pruned / 'teacher'}", f"distillation.student={pruned / 'student'}"]
    done = run(*model, f"root={tmp_path}", "distillation.steps=[4,2,1]", "distillation.recover=true")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "distill_steps"
    stages = dict.fromkeys(json.loads(line)["stage"] for line in (path / "metrics.jsonl").read_text().splitlines())
    points = json.loads((path / "evaluation.json").read_text())["points"]
    assert {p["protocol"]["prediction_type"] for p in points if p["model"] == "teacher"} == {"epsilon"}
    assert {p["protocol"]["prediction_type"] for p in points if p["model"] == "teacher-v"} == {"v_prediction"}
    assert [(p["steps"], p["protocol"]["prediction_type"]) for p in points if p["model"] == "student"] == [
        (4, "v_prediction")
    ]
    assert list(stages) == ["velocity-teacher", "velocity-student", "repair", "teacher-2", "steps-2", "steps-1"]
    student = load_pipeline(path / "steps-1/export")
    assert student.unet.config.depths == {"mid_block.attentions.0": 0}
    assert student.scheduler.config.prediction_type == "v_prediction"
    assert_drawn_alike_elsewhere(path / "steps-1/export", 1, tmp_path)


def assert_drawn_alike_elsewhere(export, steps, tmp_path, guidance=2.5):
    """A process that has diffusers and not this project draws our images, to the last bit of a pixel."""
    sampler = Sampler(load_pipeline(export), steps, guidance)
    ours = sampler.images(sampler.pipeline.unet, ["a", "b"], [0, 1])
    save_file({"noise": torch.stack([sampler.noise(i) for i in range(2)])}, tmp_path / "noise.safetensors")
    program = (
        "import sys, numpy as np\n"
        "from diffusers import DiffusionPipeline\n"
        "from safetensors.torch import load_file\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(export)!r}, trust_remote_code=True)\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        f"drawn = pipe(['a', 'b'], num_inference_steps={steps}, guidance_scale={guidance},\n"
        "             latents=load_file('noise.safetensors')['noise']).images\n"
        "np.save('images.npy', np.stack([np.asarray(image) for image in drawn]))\n"
        "assert not {'models', 'distill', 'engine'} & set(sys.modules)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    theirs = torch.from_numpy(np.load(tmp_path / "images.npy")).permute(0, 3, 1, 2)
    assert (theirs.int() - ours.int()).abs().max() <= 1


@pytest.mark.slow
def test_distillations_of_a_network_and_a_pruned_one_make_the_table_of_size_and_steps(tmp_path, pruned, tiny_model):
    model = [*tiny_model, f"model.name_or_path={pruned / 'teacher'}", "distillation.steps=[4,2]", *DIVERSITY]
    networks = {"full": [], "pruned": [f"distillation.student={pruned / 'student'}"]}
    for name, own in networks.items():
        done = run(*model, f"root={tmp_path / name}", *own)
        assert done.returncode == 0, done.stderr
    write_few_step([(name, tmp_path / name / "distill_steps") for name in networks], tmp_path / "out")
    rows = json.loads((tmp_path / "out/table.json").read_text())["rows"]
    assert [(row["network"], row["model"], row["steps"]) for row in rows] == [
        ("full", "teacher", 4), ("full", "steps-2", 2), ("pruned", "student", 4), ("pruned", "steps-2", 2)
    ]  # fmt: skip
    for row in rows[1:]:
        metrics = row["metrics"]
        assert metrics["clip"]["versus_reference"] and metrics["diversity"]["ratio_to_reference"]["ratio"] > 0
        assert metrics["fd"]["coverage"] <= 1 and metrics["latent_error"]["mean"] > 0 and row["unet_ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["guidance", "lcm"])
def test_guidance_distilled_students_need_one_evaluation_a_step(tmp_path, tiny_model, objective):
    embedded = [f"objective={objective}", "distillation.guidance_embed_dim=32", "distillation.steps=[4,2]"]
    done = run(*tiny_model, f"root={tmp_path}", *embedded)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "distill_steps/evaluation.json").read_text())["points"]
    assert all(p["facts"]["evaluations"] == p["steps"] for p in points if p["model"] == "steps-2")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "distill_steps/steps-2/export")
    assert stock.unet.config.time_cond_proj_dim == 32
    assert isinstance(stock.scheduler, LCMScheduler) == (objective == "lcm")
    assert len(stock(prompt="a", num_inference_steps=2, guidance_scale=3.0).images) == 1


@pytest.mark.slow
def test_a_guidance_distilled_student_goes_on_by_distribution_matching(tmp_path, tiny_model):
    """Its scale becomes the objective's own. What was distilled is not evaluated at many steps, nor asked there."""
    guidance = [f"root={tmp_path}", "name=guidance", "objective=guidance", "distillation.guidance_embed_dim=32"]
    assert run(*tiny_model, *guidance, "distillation.steps=[4,2]").returncode == 0
    student = f"distillation.student={tmp_path}/guidance/steps-2/export"
    job = [*tiny_model, f"root={tmp_path}", "objective=dmd", "distillation.steps=[4,2]", student]
    done = run(*job, "name=matched")
    assert done.returncode == 0, done.stderr
    assert "takes its guidance scale: it starts at 2.5" in done.stderr
    points = json.loads((tmp_path / "matched/evaluation.json").read_text())["points"]
    assert "student" not in {point["model"] for point in points}
    assert all(p["facts"]["evaluations"] == p["steps"] for p in points if p["model"] == "steps-2")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "matched/steps-2/export")
    assert stock.unet.config.time_cond_proj_dim is None
    for asked in ("objective.teacher_mix=0.5", "distillation.stages={steps-2: {teacher: student}}"):
        refused = run(*job, "name=refused", asked)
        assert refused.returncode == 1 and "at all timesteps, and it learnt few of them" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dmd", "tdm", "adversarial", "scm"])
def test_students_of_the_teachers_distribution_are_sampled_without_guidance(tmp_path, tiny_model, objective):
    """The teacher of every stage is the one of many steps, and students are compared with it as it is guided."""
    job = [*tiny_model, f"root={tmp_path}", f"objective={objective}", "distillation.steps=[4,2,1]", "train.log_every=1"]
    job += ["train.evaluate_every=2", "train.keep_best=true", "scoring.prompts=4"]
    job += ["distillation.sampler=LCMScheduler"] * (objective == "scm")
    done = run(*job, "curves.guidance=[1.0,2.5]")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "distill_steps"
    assert done.stderr.count("its teacher teacher with 4 steps") == 2
    points = [p for p in read_evaluation(path).points if p.model.startswith("steps-")]
    assert [(p.model, p.steps, p.guidance) for p in points] == [
        ("steps-2", 2, 2.5), ("steps-2", 1, 2.5), ("steps-1", 1, 2.5)
    ]  # fmt: skip
    for point in points:
        assert point.protocol["guidance_scale"] == 1 and point.facts["evaluations"] == point.steps
        assert point.versus_reference["n"] == 4
    assert "guidance_scale=1)" in (path / "steps-2/export/README.md").read_text()
    origin = origin_of(path / "steps-2/export")
    assert (origin.steps, origin.trained_steps) == (2, None if objective == "scm" else 2)
    if objective == "scm":  # LCM's scheduler draws noise, which a stock pipeline has from a generator of its own
        stock = LCMScheduler.from_pretrained(path / "steps-2/export/scheduler")
        stock.set_timesteps(2)
        assert stock.config.original_inference_steps == 2 and stock.timesteps.tolist() == [999, 499]
    else:
        assert_drawn_alike_elsewhere(path / "steps-2/export", 2, tmp_path, guidance=1.0)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    seen = {(row["stage"], row["step"]): row["calibration/clip"] for row in rows if "calibration/clip" in row}
    assert sorted(seen) == [(stage, step) for stage in ("steps-1", "steps-2") for step in (2, 3)]
    best = json.loads((path / "steps-2/best.json").read_text())
    assert best["value"] == max(seen["steps-2", 2], seen["steps-2", 3])
    assert sorted(folder.name for folder in (path / "steps-2/previews").iterdir()) == ["step-00000002", "step-00000003"]
    assert "steps-2 while it was trained" in (path / "report.html").read_text()
    rows = [row for row in rows if "calibration/clip" not in row]
    if second := {"dmd": "fake_score", "tdm": "fake_score", "adversarial": "discriminator"}.get(objective):
        assert all({f"{second}/loss", f"{second}/grad_norm", "loss", "grad_norm", "spread"} < set(row) for row in rows)
    planned = run(*job, "curves.guidance=[1.0,2.5]", "plan=true")
    assert planned.returncode == 0 and "| to do" not in planned.stdout
    refused = run(*job, "curves.guidance=[7.5]", "name=other")
    assert refused.returncode == 1 and "objective.guidance_scale=2.5 is what students have in" in refused.stderr


@pytest.mark.slow
def test_a_low_rank_student_is_a_lora_of_its_teacher(tmp_path, tiny_model, tiny_pipeline_folder):
    """The teacher in stock diffusers, with the LoRA and its scheduler, draws what the student's export does."""
    job = [*tiny_model, f"root={tmp_path}", "objective=dmd", "distillation.steps=[4,1]", "train.lora_rank=2"]
    done = run(*job, "train.learning_rate=1e-2", "train.warmup_steps=0", "objective.fake_lora_rank=2")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "distill_steps/steps-1"
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)
    exported = StableDiffusionPipeline.from_pretrained(path / "export", safety_checker=None)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": torch.randn(1, 4, 8, 8)}
    stock.scheduler = DDIMScheduler.from_pretrained(path / "lora/scheduler")
    before, theirs = (pipeline("a", output_type="latent", **options).images for pipeline in (stock, exported))
    stock.load_lora_weights(path / "lora")
    with_lora = stock("a", output_type="latent", **options).images
    assert not torch.allclose(before, theirs, atol=1e-3)
    torch.testing.assert_close(with_lora, theirs, rtol=1e-3, atol=1e-4)


def test_a_plan_names_the_stages_and_writes_nothing(finished, tmp_path, tiny_model):
    path, _ = finished
    new, done = (run(*tiny_model, *STEPS, *DIVERSITY, "plan=true", f"root={root}") for root in (tmp_path, path.parent))
    assert new.returncode == done.returncode == 0, new.stderr + done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "| to do" in new.stdout and "| done" not in new.stdout and "| to do" not in done.stdout


@pytest.mark.slow
def test_an_objective_with_a_second_network_is_two_files(tmp_path, tiny_model, monkeypatch):
    """The objective and its YAML, both outside the package."""
    place = ROOT / "tests/distill/second_network"
    assert len([path for path in place.rglob("*") if path.suffix in (".py", ".yaml")]) == 2
    monkeypatch.syspath_prepend(place)
    more = ["objective=matching", f"hydra.searchpath=[file://{place}]", "train.log_every=1", "distillation.steps=[4,2]"]
    done = run(*tiny_model, f"root={tmp_path}", *more)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "distill_steps/metrics.jsonl").read_text().splitlines()]
    assert all({"fake_score/loss", "fake_score/lr", "loss"} < set(row) for row in rows[-3:])
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "distill_steps/steps-2/export")
    assert len(stock(prompt="a", num_inference_steps=2).images) == 1


@pytest.mark.parametrize("job", [["distill_steps"], ["prune_unet"], ["prune_vae", "latents.prompts=8"]])
def test_a_model_with_prompts_needs_a_scorer(tmp_path, tiny_pipeline_folder, job):
    model = ["model=path", f"model.name_or_path={tiny_pipeline_folder}", f"root={tmp_path}", "scorer=none"]
    refused = run_job(f"+experiment={job[0]}", "data.resolution=16", "data.pairs.size=16", *job[1:], *model)
    assert refused.returncode == 1 and "scorer=none, and images are scored for their prompts" in refused.stderr
