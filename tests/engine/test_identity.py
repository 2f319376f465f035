"""Which run a command is about: runs that go on are found, new ones have a name of their own, and a short plain one."""

import re
import sys

import hydra
import pytest
from omegaconf import OmegaConf

from slimstep.engine.checked import run_path
from slimstep.engine.identity import differences, run_name
from slimstep.engine.launch import main
from slimstep.engine.overrides import parsed
from slimstep.engine.renamed import EXPERIMENTS, KEYS, VALUES, replace_moved, with_new_key, with_new_names

BARE = ["+experiment=prune_unet"]


@pytest.fixture
def folder_of(monkeypatch, tmp_path):
    """The run's folder that a command takes, and which it then begins."""

    def run(*arguments):
        paths = []

        def execute(config):
            paths.append(run_path(config))
            paths[-1].mkdir(parents=True, exist_ok=True)
            content = OmegaConf.to_yaml(OmegaConf.to_container(config, resolve=True))
            (paths[-1] / "config.yaml").write_text(content)
            (paths[-1] / "prompts.json").write_text("{}")
            return 0

        monkeypatch.setattr("slimstep.engine.execution.execute", execute)
        monkeypatch.setattr(sys, "argv", ["train.py", f"root={tmp_path}", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        assert leaving.value.code == 0
        names = [str(path.relative_to(tmp_path)) for path in paths]
        return names if "-m" in arguments else names[0]

    return run


def name(*arguments):
    return run_name("prune_unet", map(parsed, ["+experiment=prune_unet", *arguments]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "prune_unet"),
        (["plan=true", "threads=1", "tracker=wandb", "root=x", "data.cache.workers=2"], "prune_unet"),
        (["search.target_fraction=0.6"], "prune_unet-target_fraction-0.6"),
        (["search=random", "seed=1"], "prune_unet-search-random-seed-1"),
        (["train.steps=5", "eval.steps=4"], "prune_unet-eval.steps-4-train.steps-5"),
        (["decoder.width=[1,0.5]"], "prune_unet-width-1_0.5"),
    ],
)
def test_a_name_says_what_is_changed(arguments, expected):
    assert name(*arguments) == expected


def test_names_are_plain_short_and_differ_where_commands_do():
    long = [
        f"models=[{','.join(f'/data/some/where/{letter}/export' for letter in 'abcdefgh')}]",
        "distillation.student=a/b/export",
        "distillation.student=a/c/export",
        "distillation.student=d/c/export",
        "distillation.student=d_c",
        "data.root='/a b/c (1)'",
        "data.root='/ä/c=1'",
        "distillation.stages={steps-8: {teacher: teacher}}",
        "train.betas=[0.9,0.99]",
    ]
    names = [name(word) for word in long]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]{1,80}", one) and parsed(f"a={one}").value() == one for one in names), (
        names
    )
    assert names[1].startswith("prune_unet-student-b-")


def test_the_order_of_the_overrides_does_not_matter():
    assert name("seed=1", "search=random") == name("search=random", "seed=1")


def test_a_run_that_has_begun_goes_on_wherever_it_lies(folder_of, tmp_path):
    assert folder_of(*BARE) == "prune_unet"
    assert folder_of(*BARE, "seed=1") == "prune_unet-seed-1"
    assert folder_of(*BARE, "seed=0", "debug=true") == "prune_unet"  # what the default is
    assert folder_of(*BARE, "seed=1", "search=snapfusion") == "prune_unet-seed-1"
    assert folder_of(*BARE, "seed=1", "name=mine") == "mine"
    (tmp_path / "prune_unet-seed-1").rename(tmp_path / "moved")
    (tmp_path / "prune_unet").rename(tmp_path / "elsewhere")
    (tmp_path / "moved").rename(tmp_path / "prune_unet")  # by the experiment's name, as a run had it before
    assert folder_of(*BARE, "seed=1") == "prune_unet"


def test_lists_that_grow_go_on_in_their_run(folder_of):
    bare = "+experiment=distill_steps"
    first = folder_of(bare, "seed=1", "distillation.steps=[32,16]")
    assert folder_of(bare, "seed=1", "distillation.steps=[32,16,8]") == first
    assert folder_of(bare, "seed=1", "distillation.steps=[32,8]") != first


def test_a_sweep_lies_under_one_name(folder_of):
    assert folder_of("-m", *BARE, "seed=0,1") == ["prune_unet/seed=0", "prune_unet/seed=1"]
    named = folder_of("-m", *BARE, "search=random", "seed=0,1")
    assert named == ["prune_unet-search-random/seed=0", "prune_unet-search-random/seed=1"]


def test_a_chain_keeps_the_name_of_its_experiment(folder_of):
    assert folder_of("+experiment=snapfusion", "seed=1", "stages.prune_unet.train.steps=5") == "snapfusion"
    assert folder_of("+experiment=prune_unet", "budget=demo") == "prune_unet_demo"


def test_a_moved_job_is_the_same_job():
    """As a run has it that an earlier version began."""
    before = {"job": "engine.handover.hand_over", "handover": {"model": "a"}, "list": ["engine.handover.hand_over"]}
    job = "slimstep.eval.export_job.export_student"
    now = {"job": job, "export": {"model": "b"}, "list": [job]}
    assert differences(before, now) == {"export.model": ("a", "b")}
    assert differences({"job": "distill.job.distill_steps"}, {"job": "slimstep.distill.job.distill_steps"}) == {}


def test_what_an_earlier_version_did_without_saying_it_is_the_same():
    key = "evaluation.preferences.hpsv2"
    scorer = {"evaluation": {"preferences": {"hpsv2": {"_target_": "eval.clip.ClipScorer"}}}}
    clip = {"_target_": "slimstep.eval.metrics.clip.ClipScorer", "quick_gelu": False}
    now = {"evaluation": {"preferences": {"hpsv2": clip}}}
    assert differences(scorer, now) == {}
    now["evaluation"]["preferences"]["hpsv2"]["quick_gelu"] = True
    assert differences(scorer, now) == {f"{key}.quick_gelu": (None, True)}


def test_moved_paths_are_read_wherever_they_stand():
    old, new = {"_target_": "eval.clip.ClipScorer"}, {"_target_": "slimstep.eval.metrics.clip.ClipScorer"}
    handed = {"job": "slimstep.eval.export_job.export_student", "model": "???", "same": "${job}"}
    before = {**handed, "job": "eval.handover.hand_over", "scorer": old, "more": {"list": [old, [old]]}}
    config = OmegaConf.create(before)
    replace_moved(config)
    expected = {**handed, "scorer": new, "more": {"list": [new, [new]]}}
    assert OmegaConf.to_container(config) == expected
    for target in (new["_target_"], handed["job"]):
        assert callable(hydra.utils.get_object(target))


def test_an_old_key_is_read_with_a_line_that_names_the_new_one(folder_of, caplog):
    new = folder_of(*BARE, "search=bk_sdm", "search.skip_rule=shortcut", "search.method.blocks=[mid_block.resnets.0]")
    assert "is called" not in caplog.text
    old = [*BARE, "search=bk_sdm", "search.bypass=shortcut", "search.method.sites=[mid_block.resnets.0]"]
    assert folder_of(*old) == new
    assert {record.message for record in caplog.records if record.levelname == "WARNING"} == {
        f"{key} is called {KEYS[key]} now; the old name works for one version"
        for key in ("search.bypass", "search.method.sites")
    }


@pytest.mark.parametrize(("old", "arguments"), [("ladder", []), ("handover", ["handover.model=a"])])
def test_an_old_experiment_is_run_with_a_line_that_names_the_new_one(folder_of, caplog, old, arguments):
    arguments = [*arguments, "seed=1"]
    new = [word.replace("handover.", "export.") for word in arguments]
    assert folder_of(f"+experiment={old}", *arguments) == folder_of(f"+experiment={EXPERIMENTS[old]}", *new)
    assert f"{old} is called {EXPERIMENTS[old]} now; the old name works for one version" in caplog.messages
    assert with_new_key(f"restart={old}") == f"restart={EXPERIMENTS[old]}"
    assert with_new_key(f"+experiment={old}_of_mine") == f"+experiment={old}_of_mine"


def test_a_run_that_began_under_an_old_name_is_found(folder_of, tmp_path):
    assert folder_of("+experiment=cumulative") == "cumulative"
    (tmp_path / "cumulative").rename(tmp_path / "ladder")
    file = tmp_path / "ladder/config.yaml"
    file.write_text(file.read_text().replace("speed_job.cumulative", "speed_job.ladder"))
    file.write_text(file.read_text().replace("cold_start:", "first_image:").replace("\nexport:", "\nhandover:"))
    assert folder_of("+experiment=cumulative") == "ladder"


def test_a_stage_of_an_earlier_version_is_the_same_stage():
    before = {"models": {"path": "runs/a/handover/export"}, "page": {"stages": ["evaluate", "handover"]}}
    now = {"models": {"path": "runs/a/export_student/export"}, "page": {"stages": ["evaluate", "export_student"]}}
    assert differences(before, now) == {}
    assert with_new_key("stages.handover.handover.model=a") == "stages.export_student.export.model=a"


def test_a_run_that_an_earlier_version_began_has_old_keys():
    before = {"search": {"bypass": "shortcut", "method": {"depths": {"a.b": 0}, "remove": []}}, "bypass": 1}
    now = {"search": {"skip_rule": "shortcut", "method": {"architecture": {"a.b": 0}, "remove": []}}, "bypass": 1}
    assert differences(before, now) == {}
    now["search"]["skip_rule"] = "drop_skip"
    assert differences(before, now) == {"search.skip_rule": ("shortcut", "drop_skip")}


@pytest.mark.parametrize("key", KEYS)
def test_old_keys_are_read_in_files_and_in_the_table_of_a_stage(key):
    config, said = OmegaConf.create({"search": {"method": {"_target_": "x"}}}), []
    OmegaConf.update(config, key, ["a"])
    table = OmegaConf.to_container(config)
    for prefix, old in (("", table), ("stages.prune_unet.", {"stages": {"prune_unet": table}})):
        renamed = OmegaConf.create(with_new_names(old, lambda *names: said.append(names)))
        assert OmegaConf.select(renamed, f"{prefix}{KEYS[key]}") == ["a"]
        assert OmegaConf.select(renamed, f"{prefix}{key}") is None
    assert said.count((key, KEYS[key])) == 2
    new = key if "." not in key else KEYS[key]  # a whole section is added; its keys are renamed later
    assert with_new_key(f"++stages.prune_unet.{key}=[a]") == f"++stages.prune_unet.{new}=[a]"
    assert with_new_key(f"++stages.prune_unet.{key}.x=[a]") == f"++stages.prune_unet.{KEYS[key]}.x=[a]"
    assert with_new_key(f"my_{key}=1") == f"my_{key}=1"


@pytest.mark.parametrize(("key", "old"), [(key, old) for key, table in VALUES.items() for old in table])
def test_old_values_are_read_wherever_they_stand(key, old, caplog):
    new = VALUES[key][old]
    assert with_new_key(f"{key}={old}") == f"{key}={new}"
    assert with_new_key(f"stages.prune_vae.{key}={old},x") == f"stages.prune_vae.{key}={new},x"
    assert with_new_key(f"{key}={new}") == f"{key}={new}" and len(caplog.records) == 2
    table = OmegaConf.to_container(OmegaConf.from_dotlist([f"stages.prune_vae.{key}={old}"]))
    assert OmegaConf.select(OmegaConf.create(with_new_names(table)), f"stages.prune_vae.{key}") == new


def test_a_workflow_of_old_keys_is_the_bundled_one_changed():
    """Its values go over those that stand under the new name; its interpolations find what they name."""
    table = {"distillation": {"steps": [32, 16], "student": "a"}, "ladder": {"steps": [4], "rungs": {"steps-4": 1}}}
    steps = {"models": {"student": {"steps": ["${last:${stages.distill_steps.ladder.steps}}", "${ladder.steps.0}"]}}}
    renamed = with_new_names({"stages": {"distill_steps": table, "evaluate": steps}})["stages"]
    expected = {"distillation": {"steps": [4], "student": "a", "stages": {"steps-4": 1}}}
    assert renamed["distill_steps"] == expected
    assert renamed["evaluate"]["models"]["student"]["steps"] == [
        "${last:${stages.distill_steps.distillation.steps}}", "${distillation.steps.0}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("experiment", "old", "new"),
    [
        ("distill_steps", "ladder.student=a/export", "distillation.student=a/export"),
        ("distill_steps", "ladder.rungs={steps-8: {train: {steps: 2}}}",
         "distillation.stages={steps-8: {train: {steps: 2}}}"),
        ("distill_steps", "ladder={mode: progressive}", "distillation.mode=progressive"),
        ("distill_steps", "ladder.guidance_width=64", "distillation.guidance_embed_dim=64"),
        ("distill_steps", "velocity.train.steps=7", "v_prediction.train.steps=7"),
        ("prune_vae", "decoder.choice=taylor", "decoder.importance=taylor"),
        ("prune_vae", "decoder.importance=energy", "decoder.importance=activation_energy"),
        ("prune_vae", "decoder.norm_groups=thinned", "decoder.norm_groups=per_group"),
        ("prune_unet", "objective=robust", "objective=stochastic_depth"),
        ("evaluate", "evaluation.ranked_on=a/prompts.json", "evaluation.calibration_prompts=a/prompts.json"),
    ],
)
def test_an_old_command_goes_on_with_the_run_of_the_new_one(folder_of, caplog, experiment, old, new):
    first = folder_of(f"+experiment={experiment}", "seed=1", new)
    assert "is called" not in caplog.text
    assert folder_of(f"+experiment={experiment}", "seed=1", old) == first
    assert caplog.text.count("is called") == 1
