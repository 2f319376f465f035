"""A workflow of jobs: whose words are whose, what is skipped, what begins anew. The jobs here only leave a file."""

import copy
import functools
import json
import re
import shutil
import sys

import pytest
from accelerate import Accelerator
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import slimstep.engine.execution
import slimstep.engine.workflow
from slimstep.engine.checked import run_path
from slimstep.engine.execution import make_accelerator
from slimstep.engine.files import digest
from slimstep.engine.launch import main
from slimstep.engine.overrides import hydra_value
from slimstep.engine.planning import Plan
from tests.user_errors import error_line

STAGES = ("prune_unet", "prune_vae", "distill_steps", "export_student", "evaluate", "benchmark", "report")


@pytest.mark.parametrize("value", [
    3, 0.5, 1e-5, True, None, "plain/path-1.0", "a path with blanks", "it's", "back\\slash", "true", "3", "",
    "a: b, [c]", [1, "x y"], {"a": {"b": [1, None]}, "c": "d e"}, [{"name": "a", "steps": [8, 4]}], "täxt", "100%",
    "a=b", "${x}",
])  # fmt: skip
def test_a_value_is_read_as_it_was_written(value):
    assert OverridesParser.create().parse_override(f"key={hydra_value(value)}").value() == value


composed = functools.cache(slimstep.engine.workflow.compose)


@pytest.fixture
def workflow(monkeypatch, capfd, tmp_path):
    """Runs the whole method with jobs that only leave folders: exit code, what ran, its configurations, stderr.

    It runs in the test's folder: the commands of its stages, and what is composed of them, are the same in all tests.
    """
    ran = []

    def job(config):
        path = run_path(config)
        ran.append(path.name)
        (path / "export").mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.to_container(config, resolve=True)))
        (path / "evolved").mkdir(exist_ok=True)
        last = path / f"steps-{config.distillation.steps[-1]}/export"
        last.mkdir(parents=True, exist_ok=True)
        for folder in (path / "export", path / "evolved", last):
            (folder / "made.json").write_text(json.dumps([config.train.steps, config.seed]))
        config_of[path.name] = config
        return 3 if path.name == "prune_unet" else 0

    config_of = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slimstep.engine.workflow, "compose", lambda words: copy.deepcopy(composed(tuple(words))))
    monkeypatch.setattr(slimstep.engine.workflow, "free_memory", lambda: None)  # nothing was loaded
    monkeypatch.setattr(slimstep.engine.execution, "run_job", job)
    plan = lambda config, strict=False: Plan(run_path(config).name, 1.0)  # noqa: E731
    monkeypatch.setattr(slimstep.engine.execution, "planned_job", plan)

    def run(*overrides, experiment="snapfusion"):
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["train.py", f"+experiment={experiment}", "root=.", *overrides])
        with pytest.raises(SystemExit) as leaving:
            main()
        said = capfd.readouterr()
        run.stdout = said.out
        return leaving.value.code, list(ran), config_of, said.err

    Accelerator(cpu=True)
    return run


def test_stages_run_in_turn_and_only_once(workflow, tmp_path):
    code, ran, _, stderr = workflow()
    assert (code, tuple(ran)) == (3, STAGES), stderr
    assert workflow()[:2] == (3, [])
    record = json.loads((tmp_path / "snapfusion/stages/distill_steps.json").read_text())
    assert list(record["inputs"]) == ["prune_unet/export"] and "+experiment=distill_steps" in record["command"]


def test_a_model_of_videos_keeps_its_decoder(workflow, tmp_path):
    model = ["model=shapes_video", "data=shapes_video"]
    code, ran, configs, stderr = workflow(*model, experiment="snapfusion_video")
    assert (code, ran) == (3, [name for name in STAGES if name != "prune_vae"]), stderr
    assert [*configs["evaluate"].models] == ["teacher", "evolved", "repaired", "narrow_decoder", "distilled", "student"]
    assert configs["evaluate"].models.narrow_decoder is None and configs["prune_unet"].model.max_sequence_length == 20
    assert workflow(*model, "restart=prune_vae", experiment="snapfusion_video")[0] == 1


def test_words_without_a_stage_are_for_all_and_those_with_one_for_it(workflow):
    arguments = ["seed=3", "train.steps=11", "stages.prune_vae.train.steps=7", "stages.prune_vae.seed=4",
             "stages.prune_unet.search=random", "eval.guidance_scale=5"]  # fmt: skip
    _, _, configs, stderr = workflow(*arguments)
    assert [configs[name].train.steps for name in STAGES[:3]] == [11, 7, 11], stderr
    assert [configs[name].seed for name in STAGES[:3]] == [3, 4, 3]
    assert "random" in configs["prune_unet"].search.method["_target_"].lower()
    assert configs["evaluate"].curves.guidance == [5] and configs["prune_vae"].latents.guidance_scale == 5


def test_a_stage_may_have_data_and_a_precision_of_its_own(workflow, tmp_path):
    arguments = ["stages.prune_vae.data=imagefolder", f"stages.prune_vae.data.root={tmp_path}",
             "stages.prune_unet.mixed_precision=bf16"]  # fmt: skip
    code, _, configs, stderr = workflow(*arguments)
    assert code == 3, stderr
    assert configs["prune_vae"].data.root == str(tmp_path) and "root" not in configs["prune_unet"].data
    assert [configs[name].mixed_precision for name in STAGES[:2]] == ["bf16", "no"]
    made = [make_accelerator(configs[name]).mixed_precision for name in STAGES[:3]]
    assert made == ["bf16", "no", "no"]


def test_a_plan_tells_every_stage_and_how_long_all_take(workflow):
    assert workflow("plan=true")[:2] == (0, [])
    assert all(f"## {name}" in workflow.stdout for name in STAGES)
    assert "all stages: about 7.0 h of running networks" in workflow.stdout.splitlines()[-1]


def test_what_follows_from_a_new_product_begins_anew(workflow, tmp_path, caplog):
    workflow()
    made = tmp_path / "snapfusion/prune_unet/export/made.json"
    made.write_text(made.read_text()[::-1])
    _, ran, _, stderr = workflow()
    assert ran == ["distill_steps", "evaluate", "benchmark"], stderr  # the others' inputs are as they were
    assert "distill_steps begins anew, for prune_unet/export is another now" in caplog.text
    assert (tmp_path / "snapfusion/distill_steps.before-1").is_dir()


def test_a_stage_that_lost_a_file_is_run_again_where_it_is(workflow, tmp_path):
    workflow()
    (tmp_path / "snapfusion/prune_vae/evolved/made.json").unlink()
    _, ran, _, _ = workflow()
    assert ran == ["prune_vae"] and not (tmp_path / "snapfusion/prune_vae.before-1").exists()


def test_restart_begins_with_its_stage(workflow, tmp_path):
    workflow()
    assert workflow("restart=evaluate")[1] == list(STAGES[4:])
    assert (tmp_path / "snapfusion/evaluate.before-1").is_dir()


def test_the_export_is_that_of_the_last_stage_that_has_one(workflow, tmp_path):
    workflow("stages.distill_steps.distillation.steps=[32,16,8,4]")
    export, made = tmp_path / "snapfusion/export", tmp_path / "snapfusion/report/export/made.json"
    assert export.is_dir() and not export.is_symlink()
    assert (export / "made.json").read_text() == made.read_text()
    (export / "README.md").write_text("mine")  # a finished workflow leaves alone what it exported
    workflow("stages.distill_steps.distillation.steps=[32,16,8,4]")
    assert (export / "README.md").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("left", ["link", "torn copy"])
def test_an_export_of_earlier_versions_or_of_a_killed_copy_becomes_a_folder(workflow, tmp_path, left):
    workflow()
    export, record = tmp_path / "snapfusion/export", tmp_path / "snapfusion/stages/export.json"
    shutil.rmtree(export)
    if left == "link":
        export.symlink_to("report/export")
        record.unlink()
    else:
        export.mkdir()
        record.write_text("{}")
    assert workflow()[0] == 3 and export.is_dir() and not export.is_symlink() and (export / "made.json").is_file()


@pytest.mark.slow
def test_a_workflow_that_an_earlier_version_has_made_is_not_made_anew(workflow, tmp_path):
    """Its stage `handover` is `export_student` now: in folders, records and configurations."""
    workflow()
    run = tmp_path / "snapfusion"
    (run / "export_student").rename(run / "handover")
    (run / "stages/export_student.json").rename(run / "stages/handover.json")
    others = {"export_student/export": "handover/export", "- export_student": "- handover"}
    for file in (*run.glob("*/config.yaml"), *run.glob("stages/*.json")):
        size, before = file.stat().st_size, digest(file)
        for new, old in others.items():
            file.write_text(file.read_text().replace(new, old))
        if file.suffix == ".yaml":  # records hold sizes and digests
            record, others[before] = run / f"stages/{file.parent.name}.json", digest(file)
            record.write_text(record.read_text().replace(f": {size}", f": {file.stat().st_size}"))
    assert workflow()[:2] == (3, [])
    assert (run / "handover").is_symlink() and (run / "export_student/export").is_dir()


def test_a_folder_of_the_users_own_is_not_replaced(workflow, tmp_path):
    (tmp_path / "snapfusion/export").mkdir(parents=True)
    code, ran, _, stderr = workflow()
    assert (code, ran) == (1, []) and "snapfusion/export is a folder that this run has not made" in stderr


def test_a_distillation_that_goes_on_is_no_finished_stage(workflow):
    workflow()
    _, ran, configs, stderr = workflow("stages.distill_steps.distillation.steps=[32,16,8,4]", "run.overwrite=true")
    assert ran[0] == "distill_steps" and list(configs["distill_steps"].distillation.steps) == [32, 16, 8, 4], stderr


@pytest.mark.slow
def test_a_restart_that_was_killed_goes_on(workflow, tmp_path, monkeypatch):
    workflow()
    (tmp_path / "snapfusion/stages/restart.json").write_text('["evaluate"]')  # as a kill amid a restart leaves it
    assert workflow("restart=evaluate")[1] == []
    assert workflow("restart=evaluate")[1] == list(STAGES[4:])


@pytest.mark.slow
def test_a_sweep_runs_a_chain_for_every_value(workflow, tmp_path):
    code, ran, configs, stderr = workflow("-m", "seed=1,2")
    assert (code, ran) == (3, 2 * list(STAGES)), stderr
    for value in (1, 2):
        assert (tmp_path / f"snapfusion/seed={value}/prune_unet/export/made.json").is_file()


@pytest.mark.parametrize(("wrong", "culprit"), [
    ("stages.prune_unet.train.stps=3", "stages.prune_unet: .*stps"),
    ("stages.prune_vae.decoder.width=2", "stages.prune_vae: decoder.width=2"),
    ("stages.prune_unets.train.steps=3", "prune_unets"),
    ("stages.evaluate=3", "stages.evaluate=3 must be a table"),
    ("restart=prune", "restart=prune is no stage"),
    ("stages.prune_vae.name=other", "stages.prune_vae.name: a stage lies under its workflow"),
    ("~stages.prune_vae", "no stage before it makes"),
    ("stages.prune_vae=null", "no stage before it makes"),
    ("stages.distill_steps.distillation.steps=[]", "distillation.steps"),
])  # fmt: skip
def test_a_mistake_in_a_stage_is_one_line_before_anything_runs(workflow, wrong, culprit):
    code, ran, _, stderr = workflow(wrong)
    assert re.search(culprit, error_line(code, stderr)) and not ran
