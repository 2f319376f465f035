"""The evaluation job on random models: pairing, resuming, what it writes, and the distances it is made of."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

from scripts.random_transformers import small_sd3_pipeline
from slimstep.data.prompts import PromptSet
from slimstep.engine.files import digest
from slimstep.eval.given import GivenModel, GivenModels, given_models, name_models
from slimstep.eval.metrics.compare import paired_difference
from slimstep.eval.metrics.distribution import frechet_distance
from slimstep.eval.metrics.inception import Inception
from slimstep.models.networks import sequence_length
from slimstep.models.original_layout import original_weights
from slimstep.models.pipeline import export_pipeline, load_pipeline, with_unet
from tests.jobs import run_job
from tests.user_errors import error_line

ROOT = Path(__file__).resolve().parents[2]
ANY_DATA = [
    "+experiment=evaluate", "data.resolution=16", "eval.prompts=4", "eval.pictures=2", "eval.batch_size=3",
    "curves.steps=[1,2]", "curves.guidance=[1,3]", "evaluation.real_images=8",
]  # fmt: skip
SMALL = [*ANY_DATA, "data.pairs.size=16"]


def run(*overrides):
    return run_job("name=evaluate", *SMALL, *overrides)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_pipeline_folder):
    """The random teacher, and a student of it with a block less."""
    teacher, folder = load_pipeline(tiny_pipeline_folder), tmp_path_factory.mktemp("models") / "student/export"
    export_pipeline(with_unet(teacher, teacher.unet.with_architecture({"mid_block.attentions.0": 0})), folder)
    return f"models=[{tiny_pipeline_folder},{folder}]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, models):
    root = tmp_path_factory.mktemp("runs")
    done = run(*tiny_model, models, f"root={root}")
    assert done.returncode == 0, done.stderr
    return root / "evaluate", done


def test_it_leaves_results_tables_pictures_and_a_last_line_for_programs(finished):
    path, done = finished
    results, last = json.loads((path / "evaluation.json").read_text()), json.loads(done.stdout.splitlines()[-1])
    assert list(results["models"]) == ["pipeline", "student"] and results["reference"]["model"] == "pipeline"
    assert len(results["points"]) == len(last["points"]) == 2 * 2 * 2
    with open(path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["clip.mean"]) for row in rows] == [point["clip"]["mean"] for point in last["points"]]
    for name in ("table.md", "report.html", "report/images.png", "report/clip-against-steps.png",
                 "report/clip-against-guidance.png"):  # fmt: skip
        assert (path / name).is_file(), name
    sentence = "prompts is among the captions of the data's training images."
    assert sentence in done.stderr and sentence.partition("'")[0] in (path / "report.html").read_text()


def test_a_model_may_have_its_own_numbers_of_steps(leave, tmp_path, tiny_model, tiny_pipeline_folder):
    models = f"models={{a: {{path: {tiny_pipeline_folder}, steps: [1, 3]}}, b: {tiny_pipeline_folder}}}"
    code, stderr = leave(*tiny_model, *SMALL, models, "curves.guidance=[3]", "evaluation.distribution=false")
    assert code == 0, stderr
    results = json.loads((tmp_path / "runs/evaluate/evaluation.json").read_text())
    assert [(p["model"], p["steps"]) for p in results["points"]] == [("a", 3), ("a", 1), ("b", 2), ("b", 1)]
    assert results["reference"] == {"model": "a", "steps": 3}


def test_a_model_of_few_steps_stands_beside_a_guided_one_with_its_own_scheduler_steps_and_guidance(
    leave, tmp_path, tiny_model, tiny_pipeline_folder
):
    few = f"{{path: {tiny_pipeline_folder}, scheduler: lcm, steps: [2, 1], guidance: 0}}"
    models = f"models={{teacher: {{path: {tiny_pipeline_folder}, steps: [3]}}, few: {few}}}"
    code, stderr = leave(*tiny_model, *SMALL, models, "curves.guidance=[3,5]", "evaluation.distribution=false")
    assert code == 0, stderr
    path = tmp_path / "runs/evaluate"
    points = json.loads((path / "evaluation.json").read_text())["points"]
    read = [(p["model"], p["guidance"], p["steps"], p["facts"]["evaluations"]) for p in points]
    assert read == [("teacher", 3, 3, 6), ("teacher", 5, 3, 6), ("few", 3, 2, 2), ("few", 3, 1, 1)]
    sampled = [(p["protocol"]["scheduler"], p["protocol"]["guidance_scale"]) for p in points]
    assert sampled == [("DDIMScheduler", 3), ("DDIMScheduler", 5), *[("LCMScheduler", 0)] * 2]
    base, _, *others = [p["metrics"]["clip"] for p in points]
    for other in others:
        difference = np.subtract(other["per_prompt"], base["per_prompt"]).mean()
        assert other["versus_reference"]["mean"] == pytest.approx(difference)
    rows = list(csv.DictReader((path / "results.csv").read_text().splitlines()))
    assert [row["sampled_guidance"] for row in rows] == ["3.0", "5.0", "0.0", "0.0"]
    table = (path / "table.md").read_text()
    assert "| few" in table and "0 (reference 3)" in table


def test_a_row_is_loaded_with_its_own_options_and_others_without(tiny_pipeline_folder):
    few = {"path": str(tiny_pipeline_folder), "scheduler": "euler_a", "timestep_spacing": "trailing", "guidance": 0}
    models = given({"teacher": str(tiny_pipeline_folder), "few": few})
    models.check()
    schedulers = {name: models.load_named(name).scheduler for name in models.models}
    assert [type(s).__name__ for s in schedulers.values()] == ["DDIMScheduler", "EulerAncestralDiscreteScheduler"]
    assert schedulers["few"].config.timestep_spacing == "trailing"
    with pytest.raises(ValueError, match=r"models.few.guidance=0 is of the first model.*curves.guidance=\[0\]"):
        given({"few": few})
    with pytest.raises(ValueError, match="models.few.guidance=-1 must be a number from 0 up"):
        given({"few": {**few, "guidance": -1}})
    with pytest.raises(ValueError, match="LCMScheduler spaces its timesteps trailing, always"):
        given({"few": {"path": str(tiny_pipeline_folder), "scheduler": "lcm", "timestep_spacing": "leading"}}).check()


def test_every_model_is_evaluated_at_the_resolution_that_is_asked_for(leave, tmp_path, tiny_model, models):
    evaluated = ["evaluation.distribution=false", "curves.guidance=[3]", "curves.steps=[2]"]
    code, stderr = leave(*tiny_model, *SMALL, models, *evaluated, "data.resolution=32")
    assert code == 0, stderr
    points = json.loads((tmp_path / "runs/evaluate/evaluation.json").read_text())["points"]
    assert [point["protocol"]["latents"] for point in points] == [[4, 16, 16]] * 2
    line = error_line(*leave(*tiny_model, *SMALL, models, *evaluated, "data.resolution=18", "name=other"))
    assert "multiples of 4" in line


@pytest.mark.parametrize(
    "wrong", ["{path: DIR, stp: [1]}", "{steps: [1]}", "{path: DIR, steps: 4}", "{path: DIR, steps: [0]}"]
)
def test_a_model_that_is_written_wrongly_is_named(leave, tiny_model, tiny_pipeline_folder, wrong):
    models = f"models={{student: {wrong.replace('DIR', str(tiny_pipeline_folder))}}}"
    assert "models.student" in error_line(*leave(*tiny_model, *SMALL, models))


def test_differences_are_paired_with_the_reference_at_its_most_steps(finished):
    points = json.loads((finished[0] / "evaluation.json").read_text())["points"]
    base = next(p for p in points if (p["model"], p["steps"], p["guidance"]) == ("pipeline", 2, 3.0))
    assert base["metrics"]["clip"]["versus_reference"] is None and base["metrics"]["psnr"] is None
    for point in points:
        if point["guidance"] == 3.0 and point is not base:
            difference = np.subtract(*(p["metrics"]["clip"]["per_prompt"] for p in (point, base)))
            assert point["metrics"]["clip"]["versus_reference"]["mean"] == pytest.approx(difference.mean())
            assert point["metrics"]["psnr"]["mean"] < 58


def test_a_setting_that_is_evaluated_is_not_evaluated_again(finished, tiny_model, models):
    path, _ = finished
    before = {file: file.stat().st_mtime_ns for file in path.glob("evaluation/**/*.json")}
    gone = path / "evaluation/student/guidance-3.0-steps-1.json"
    content, evaluation = gone.read_bytes(), json.loads((path / "evaluation.json").read_text())
    gone.unlink()
    (path / "evaluation.json").unlink()
    again = run(*tiny_model, models, f"root={path.parent}")
    assert again.returncode == 0, again.stderr
    after = {file: file.stat().st_mtime_ns for file in path.glob("evaluation/**/*.json")}
    assert [file for file in before if after[file] != before[file]] == [gone] and gone.read_bytes() == content
    made = json.loads((path / "evaluation.json").read_text())
    assert made | {"environment": {}} == evaluation | {"environment": {}}


def test_a_plan_draws_nothing(tmp_path, tiny_model, models):
    plan = run(*tiny_model, models, f"root={tmp_path}", "plan=true")
    assert plan.returncode == 0 and "evaluation/student/guidance-3.0-steps-1.json" in plan.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["models=[/nowhere]"], "/nowhere"),
        (["models=[a/export,a/export]"], "names one of them twice"),
        (["models=[/no.safetensors]"], "/no.safetensors' does not exist"),
        (["data.prompt_file=/nowhere.txt"], "/nowhere.txt does not exist"),
        (["eval.prompts=9999"], "9999"),
        (["curves.steps=[]"], r"curves.steps=\[\] must be a list"),
        (["evaluation.calibration_prompts=/no.json"], "calibration_prompts=/no.json does not exist; give prune_unet"),
        (["evaluation.inception=/no.pth"], "evaluation.inception=/no.pth does not exist; bring https"),
        (["evaluation.inception=x", "evaluation.distribution=false"], "needs evaluation.distribution=true"),
        (["evaluation.real_images=1"], "evaluation: real_images=1 must be at least 2"),
    ],
)
def test_mistakes_end_in_a_line(overrides, expected, leave, tiny_model):
    assert re.search(expected, error_line(*leave(*SMALL, *tiny_model, *overrides)))


ONE = ["curves.steps=[1]", "curves.guidance=[1]"]


@pytest.fixture
def results(leave, tiny_model, tmp_path):
    """Runs the job in this process at one setting, unless told otherwise; what evaluation.json then holds."""

    def run(*overrides, job=SMALL, name="evaluate"):
        code, stderr = leave(*job, *ONE, *tiny_model, f"name={name}", *map(str, overrides))
        assert code == 0, stderr
        return json.loads((tmp_path / f"runs/{name}/evaluation.json").read_text())

    return run


def test_a_data_set_of_the_hub_gives_the_prompts_and_the_real_images(results, tmp_path):
    pictures = [Image.new("RGB", (20, 16), (6 * k, 0, 90)) for k in range(40)]
    rows = {"image": pictures, "text": [f"row {k}" for k in range(40)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "set")
    found = results("data=hub", f"data.source={tmp_path / 'set'}", "data.heldout_fraction=0.5", job=ANY_DATA)
    assert all(re.fullmatch(r"row \d+", text) for text in found["shown"]) and found["n"] == 4
    assert found["points"][0]["metrics"]["fd"]["n_real"] == 8


@pytest.mark.parametrize("kind", [".parquet", ".json"])
def test_prompts_come_from_files(results, tmp_path, kind):
    path = tmp_path / f"set{kind}"
    if kind == ".parquet":
        datasets.Dataset.from_dict({"caption": list("abcdef")}).to_parquet(path)
    else:
        rows = [{"image_id": 100 - k, "id": k, "caption": letter + "\n"} for k, letter in enumerate("fedcba")]
        path.write_text(json.dumps({"images": [{"id": row["image_id"]} for row in rows], "annotations": rows}))
    found = results(f"data.prompt_file={path}")
    assert found["prompts"] == "set[0:4]" and found["shown"] == ["a", "b"]
    assert found["prompts_hash"] == PromptSet(tuple("abcd"), "").hash


def test_calibration_prompts_are_no_eval_prompts(results, tmp_path):
    (tmp_path / "set.txt").write_text("\n".join("abcdefgh"))
    (tmp_path / "prompts.json").write_text(json.dumps({"calibration_prompts": ["h", "b", "a"], "eval_prompts": ["c"]}))
    files = f"data.prompt_file={tmp_path / 'set.txt'}", f"evaluation.calibration_prompts={tmp_path / 'prompts.json'}"
    found = results(*files)
    assert found["shown"] == ["c", "d"] and found["prompts_hash"] == PromptSet(tuple("cdef"), "").hash


def scores(found):
    return [point["metrics"]["clip"]["per_prompt"] for point in found["points"]]


def test_the_batch_size_changes_no_more_than_rounding(results):
    three, one = (results("curves.steps=[2]", f"eval.batch_size={n}", name=n) for n in (3, 1))
    np.testing.assert_allclose(scores(three), scores(one), atol=0.02)
    for key in ("fd", "kd"):
        ours, theirs = (found["points"][0]["metrics"]["fd"][key] for found in (three, one))
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-5)


def test_a_model_under_two_names_does_not_differ_from_itself(results, tiny_pipeline_folder):
    found = results(f"models={{a: {tiny_pipeline_folder}, b: {tiny_pipeline_folder}}}")
    a, b = found["points"]
    assert a["metrics"]["fd"] == b["metrics"]["fd"]
    versus = b["metrics"]["clip"].pop("versus_reference")
    assert a["metrics"]["clip"].pop("versus_reference") is None and a["metrics"]["clip"] == b["metrics"]["clip"]
    assert versus == {"mean": 0.0, "se": 0.0, "low": 0.0, "high": 0.0, "n": 4}


def test_a_model_at_two_seeds_does_not_differ_from_itself_beyond_chance(results):
    one, other = (results("eval.prompts=24", f"eval.seed={n}", name=n) for n in (1, 2))
    (first,), (second,) = scores(one), scores(other)
    assert first != second
    difference = paired_difference(first, second)
    assert difference.low < 0 < difference.high


def test_the_scores_are_those_of_open_clip_on_the_pictures(results, tmp_path, tiny_clip_folder):
    found, model = results("eval.pictures=4"), f"local-dir:{tiny_clip_folder}"
    clip, _, preprocess = open_clip.create_model_and_transforms(model)
    files = sorted((tmp_path / "runs/evaluate/images").glob("*/*/*.png"))
    with torch.no_grad():
        images = clip.eval().encode_image(torch.stack([preprocess(Image.open(file)) for file in files]))
        texts = clip.encode_text(open_clip.get_tokenizer(model)(found["shown"]))
    assert len(files) == 4
    by_hand = 100 * torch.nn.functional.cosine_similarity(images, texts)
    np.testing.assert_allclose(scores(found)[0], by_hand, atol=1e-4)


@pytest.mark.slow
def test_fid_and_kid_stand_beside_the_distances_of_the_scorer(results, tmp_path, inception_file):
    found = results(f"evaluation.inception={inception_file}", "evaluation.real_images=4", "eval.pictures=4")
    plain = results("evaluation.real_images=4", "eval.pictures=4", name="plain")
    distances, without = (both["points"][0]["metrics"] for both in (found, plain))
    assert set(distances) - set(without) == {"fid"} and {"fid", "kid", "kid_se"} < set(distances["fid"])
    assert without == {key: distances[key] for key in without}
    assert found["protocol"]["inception"] == digest(inception_file)[:12] and plain["protocol"]["inception"] is None
    folder = tmp_path / "runs/evaluate"
    images = torch.stack([pil_to_tensor(Image.open(file)) for file in sorted(folder.glob("images/*/*/*.png"))])
    made = Inception(inception_file)(images)
    real = load_file(folder / "reference/real-fid.safetensors")["features"]
    assert distances["fid"]["fid"] == pytest.approx(frechet_distance(made, real), rel=1e-3)
    headings = [(tmp_path / f"runs/{name}/table.md").read_text().splitlines()[0] for name in ("evaluate", "plain")]
    assert ["FID" in heading and "KID ×1000 ± sd" in heading for heading in headings] == [True, False]


def test_a_single_file_is_evaluated_as_the_folder_of_the_same_model(results, tmp_path, sd15_folder):
    file = tmp_path / "tiny.safetensors"
    save_file(original_weights(StableDiffusionPipeline.from_pretrained(sd15_folder)), file)
    given = f"models={{folder: {sd15_folder}, file: {file}}}"
    found = results(given, f"model.single_file_config={sd15_folder}")
    ours, theirs = scores(found)
    assert ours == theirs


def given(models, **model) -> GivenModels:
    model = {**OmegaConf.to_container(OmegaConf.load(ROOT / "configs/model/path.yaml")), **model}
    return given_models(OmegaConf.create({"models": models, "model": model, "data": {"resolution": None}}), [8], "test")


def test_what_belongs_to_the_teacher_is_not_given_to_its_students(tiny_pipeline_folder, tmp_path):
    teacher, student = str(tiny_pipeline_folder), str(tmp_path / "student")
    export_pipeline(load_pipeline(teacher), student)
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    down, up = torch.ones(2, 16), torch.ones(16, 2)
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    save_file({f"{site}_A.weight": down, f"{site}_B.weight": up}, lora)
    changes = {"name_or_path": teacher, "loras": [{"path": str(lora)}], "scheduler": "euler", "vae": student}
    models = given({"teacher": teacher, "student": student}, dtype="bfloat16", **changes)
    models.check()
    loaded = {name: models.load(path) for name, path in models.paths.items()}
    assert {type(p.scheduler).__name__ for p in loaded.values()} == {"EulerDiscreteScheduler", "DDIMScheduler"}
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    plain = load_pipeline(teacher, "bfloat16").unet.state_dict()
    for name, pipeline in loaded.items():
        assert pipeline.unet.dtype == torch.bfloat16
        differing = [key for key, value in pipeline.unet.state_dict().items() if not torch.equal(value, plain[key])]
        assert differing == ([attention] if name == "teacher" else [])


def test_models_without_long_prompts_stand_beside_a_transformer(tiny_pipeline_folder, tmp_path):
    """max_sequence_length is of the model that it is said of; a Stable Diffusion 1 has none."""
    export_pipeline(small_sd3_pipeline(), tmp_path / "sd3")
    paths = {"teacher": str(tmp_path / "sd3"), "other": str(tiny_pipeline_folder)}
    models = given(paths, name_or_path=paths["teacher"], max_sequence_length=5)
    models.check()
    assert [sequence_length(models.load(path)) for path in paths.values()] == [5, None]


def test_options_of_a_model_that_is_not_evaluated_are_an_error(tiny_pipeline_folder):
    for changes in ({"scheduler": "euler"}, {"scheduler": "euler", "name_or_path": "elsewhere"}):
        with pytest.raises(ValueError, match="model.scheduler=euler is of model.name_or_path=.*not among models="):
            given([str(tiny_pipeline_folder)], **changes).check()


@pytest.mark.parametrize(("pictures", "kept"), [(0, 0), (3, 3), (99, 4)])
def test_as_many_images_are_kept_as_asked_for(results, tmp_path, pictures, kept):
    found, folder = results(f"eval.pictures={pictures}"), tmp_path / "runs/evaluate"
    assert len(found["shown"]) == len(list(folder.glob("images/*/*/*.png"))) == kept
    assert (folder / "report/images.png").exists() == (folder / "images").exists() == bool(kept)


@pytest.mark.slow
def test_an_offline_wandb_run_leaves_the_last_line_to_json(tmp_path, tiny_model, models):
    """Without a key, a network or W&B's silence; the table and the images are in its folder."""
    loud = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT")
    environment = {key: value for key, value in os.environ.items() if key not in loud}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    job = [*SMALL, *ONE, *tiny_model, models, "tracker=wandb", f"root={tmp_path}", "name=evaluate"]
    command = [sys.executable, str(ROOT / "train.py"), *job]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["points"]) == 2
    media = tmp_path / "evaluate/wandb" / "latest-run/files/media"
    assert list(media.glob("table/models_*.json")) and list(media.glob("images/report/images_*.png"))


def test_names_are_the_shortest_that_tell_models_apart():
    assert name_models(["runs/a/export", "runs/b/export"]) == {"a": "runs/a/export", "b": "runs/b/export"}
    assert list(name_models(["x/steps-8/export", "y/steps-8/export"])) == ["x-steps-8", "y-steps-8"]


def test_names_of_models_fit_on_a_disk(tmp_path):
    deep = "/".join(["very-long-name" * 10] * 3)
    names = list(name_models([f"x/{deep}/export", f"y/{deep}/export", "z/export"]))
    assert len(set(names)) == 3 and names[2].endswith("z")
    for name in names:
        (tmp_path / f"{name}-guidance-7.5-steps-100.safetensors").touch()
    with pytest.raises(ValueError, match=r"^models='../a' must name a folder, and none outside the run"):
        GivenModel.of("../a", "DIR")
    with pytest.raises(ValueError, match="a name of 300 bytes, and at most 200 can be a folder's: shorten it"):
        GivenModel.of("ä" * 150, {"path": "DIR"})


@pytest.mark.slow
def test_compiled_networks_score_alike_and_leave_their_graphs_for_the_next(finished, tmp_path, tiny_model):
    given = [*tiny_model, "evaluation.compile=true", f"evaluation.artifacts={tmp_path / 'artifacts'}",
             "eval.batch_size=4", "curves.steps=[2]", "curves.guidance=[3]"]  # fmt: skip
    job = [sys.executable, ROOT / "train.py", *SMALL, *given, f"root={tmp_path}"]
    first, second = (
        subprocess.run([*job, f"name={name}"], capture_output=True, text=True, cwd=ROOT) for name in ("first", "second")
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    (file,) = (tmp_path / "artifacts").iterdir()
    assert "which left" in first.stderr + first.stdout and f"with {file}" in second.stderr + second.stdout
    eager = next(p for p in json.loads((finished[0] / "evaluation.json").read_text())["points"]
                 if (p["model"], p["steps"], p["guidance"]) == ("pipeline", 2, 3.0))  # fmt: skip
    (point,) = json.loads((tmp_path / "second/evaluation.json").read_text())["points"]
    assert point["metrics"]["clip"]["per_prompt"] == pytest.approx(eager["metrics"]["clip"]["per_prompt"], abs=0.05)
