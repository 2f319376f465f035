"""What accelerate's launcher asks for is done or refused in one line, and never ignored."""

import json

import pytest

from slimstep.engine.checked import CONFIGS
from slimstep.engine.execution import make_accelerator
from slimstep.engine.launcher import check_launcher
from tests.user_errors import error_line

ZERO2 = CONFIGS / "accelerate/zero2.json"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}
OF_A_PLAIN_LAUNCH = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}


class Precision:
    mixed_precision = "no"


@pytest.mark.parametrize(
    ("requested", "way"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.accumulation=N"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "train.max_grad_norm=X"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "train.compile=true"),
        ({"ACCELERATE_FP8_BACKEND": "TE"}, "mixed_precision=bf16"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "fsdp"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "fsdp"),
        ({"ACCELERATE_TORCH_DEVICE": "mps"}, "cuda or cpu"),
        ({**FSDP, "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "True"}, "without weights"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "choose 2"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"}, "/nowhere.json cannot be read"),
    ],
    ids=lambda value: list(value)[-1] if isinstance(value, dict) else "",
)
def test_what_is_ours_is_refused_with_our_key(requested, way):
    with pytest.raises(ValueError, match=way):
        check_launcher({**OF_A_PLAIN_LAUNCH, **requested}, Precision)


@pytest.mark.parametrize(
    "environment", [{}, OF_A_PLAIN_LAUNCH, FSDP, DEEPSPEED], ids=["none", "plain", "fsdp", "zero2"]
)
def test_what_we_do_passes(environment):
    check_launcher(environment, Precision)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_accumulation_steps", 4),
        ("gradient_clipping", 1.0),
        ("bf16", {"enabled": True}),
        ("zero_optimization", {"stage": 3}),
        ("train_micro_batch_size_per_gpu", 8),
    ],
)
def test_deepspeed_files_say_nothing_that_is_overwritten(tmp_path, key, value):
    own = json.loads(ZERO2.read_text())
    environment = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json")}
    (tmp_path / "zero.json").write_text(json.dumps(own))
    check_launcher(environment, Precision)
    (tmp_path / "zero.json").write_text(json.dumps({**own, key: value}))
    with pytest.raises(ValueError, match=key):
        check_launcher(environment, Precision)


@pytest.mark.parametrize(
    ("launcher", "ours", "expected"),
    [
        ("bf16", [], "bf16"),
        ("no", [], "no"),
        (None, [], "no"),
        ("bf16", ["mixed_precision=no"], "no"),
        ("no", ["mixed_precision=bf16"], "bf16"),
        ("no", ["+hardware=a100x8"], "bf16"),
    ],
)
def test_mixed_precision_is_the_launchers_where_the_run_gives_none(
    monkeypatch, caplog, leave, launcher, ours, expected
):
    seen = []
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    execute = lambda config: seen.append(make_accelerator(config).mixed_precision) or 0  # noqa: E731
    monkeypatch.setattr("slimstep.engine.execution.execute", execute)
    assert leave("+experiment=prune_unet", *ours)[0] == 0 and seen == [expected]
    assert ("not accelerate's bf16" in caplog.text) == (launcher == "bf16" and expected == "no")


def test_a_precision_that_is_none_is_reported_with_who_gives_it(monkeypatch, leave):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "'fp8' is unknown (accelerate's launcher gives it)" in error_line(*leave("+experiment=prune_unet"))
