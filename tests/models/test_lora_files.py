"""LoRA files beside the common ones: PEFT's own, the LCM-LoRA script's, OneTrainer's, and adapters of other kinds."""

import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.lora import fuse_lora, fuse_loras
from slimstep.models.pipeline import with_unet
from tests.loras import draw_lora
from tests.models.conftest import make_small_pipeline
from tests.models.test_lora_names import draw_pairs, kohya_file
from tests.tiny import tiny_sdxl_pipeline

TARGETS = {"unet": ["to_q", "conv1", "proj_in"], "text_encoder": ["q_proj", "fc1"],
           "text_encoder_2": ["v_proj", "text_projection"]}  # fmt: skip
PEFT = "base_model.model."


@pytest.fixture
def pipeline():
    own = make_small_pipeline()
    return with_unet(own, PrunableUNet2DConditionModel.from_unet(own.unet))


def of_parts(pipeline, parts, **options):
    """{part: its LoRA in PEFT's names}."""
    return {part: draw_lora(getattr(pipeline, part), TARGETS[part], **options) for part in parts}


def factor_of(fields, path, rank):
    """PEFT's α/r, or α/√r, for the fields that these tests use."""
    alpha = next((a for key, a in fields.get("alpha_pattern", {}).items() if path.endswith(key)), fields["lora_alpha"])
    return alpha / (rank**0.5 if fields.get("use_rslora") else rank)


def expected(network, lora, fields, scale=1.0):
    """m (W + s·α/r · B A) / ‖…‖, or without m the sum alone, by hand."""
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    for path in {key.split(".lora_")[0] for key in lora}:
        a, b = (lora[f"{path}.lora_{name}.weight"] for name in "AB")
        weight = weights[f"{path}.weight"]
        sum_OI = weight.flatten(1) + scale * factor_of(fields, path, len(a)) * b.flatten(1) @ a.flatten(1)
        if (magnitude := lora.get(f"{path}.lora_magnitude_vector")) is not None:
            sum_OI = magnitude.view(-1, 1) * sum_OI / sum_OI.norm(dim=1, keepdim=True)
        weights[f"{path}.weight"] = sum_OI.view_as(weight)
    return weights


def assert_fused(pipeline, source, loras, fields, scale=1.0):
    target = {part: expected(getattr(pipeline, part), lora, fields, scale) for part, lora in loras.items()}
    fuse_loras(pipeline, [{"path": str(source), "scale": scale}])
    for part, weights in target.items():
        for key, value in getattr(pipeline, part).state_dict().items():
            torch.testing.assert_close(value, weights[key], rtol=1e-5, atol=1e-5, msg=f"{part}.{key}")


def write_peft(folder, lora, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({PEFT + key: value for key, value in lora.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **fields}))
    return folder


FIELDS = [
    {"lora_alpha": 3}, {"lora_alpha": 3, "use_rslora": True}, {"lora_alpha": 3, "alpha_pattern": {"to_q": 5, "fc1": 2}},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pefts_own_folder_is_fused_at_its_own_alpha(pipeline, tmp_path, part, fields):
    loras = of_parts(pipeline, [part], rank=4)
    folder = write_peft(tmp_path / "adapter", loras[part], **fields)
    assert_fused(pipeline, folder, loras, fields, 0.5)
    again = make_small_pipeline()
    assert_fused(again, folder / "adapter_model.safetensors", loras, fields)


def test_a_folder_of_pefts_folders_is_all_of_them_each_at_its_alpha(tmp_path):
    """Of two text encoders of one width only the folder's name tells which."""
    pipeline = tiny_sdxl_pipeline()
    loras = of_parts(pipeline, TARGETS, rank=4)
    for part, lora in loras.items():
        write_peft(tmp_path / part, lora, lora_alpha=8)
    assert_fused(pipeline, tmp_path, loras, {"lora_alpha": 8})


def test_pefts_lora_of_one_of_two_text_encoders_that_both_fit_is_asked_for(tmp_path):
    pipeline = tiny_sdxl_pipeline()
    lora = draw_lora(pipeline.text_encoder, ["q_proj"])
    with pytest.raises(ValueError, match="does not say for which network .*one of text_encoder, text_encoder_2"):
        fuse_loras(pipeline, [{"path": str(write_peft(tmp_path / "adapter", lora, lora_alpha=4))}])


def test_pefts_file_without_its_configuration_is_no_guess(pipeline, tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    save_file({PEFT + key: value for key, value in of_parts(pipeline, ["unet"])["unet"].items()}, file)
    with pytest.raises(ValueError, match=r"adapter_config.json, which tells its alpha, cannot be read"):
        fuse_loras(pipeline, [{"path": str(file)}])


@pytest.mark.parametrize("prefixes", [
    {"unet": f"unet.{PEFT}"}, {"unet": ""}, {"unet": "unet.", "text_encoder": "text_encoder."},
    {"unet": f"unet.{PEFT}", "text_encoder": f"text_encoder.{PEFT}"},
    {"unet": "unet.", "text_encoder": "text_encoder.text_model."},
])  # fmt: skip
@pytest.mark.parametrize("suffixes", [
    ("lora_A.weight", "lora_B.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora.down.weight", "lora.up.weight"), ("lora_down.weight", "lora_up.weight"),
])  # fmt: skip
def test_names_with_and_without_a_part_and_of_every_ending_are_read(pipeline, tmp_path, prefixes, suffixes):
    """`unet.base_model.model.…` is what diffusers' script for LCM-LoRAs writes; α is the rank, as nothing tells it."""
    loras, weights = of_parts(pipeline, prefixes), {}
    for part, lora in loras.items():
        for key, value in lora.items():
            name = key.replace("lora_A.weight", suffixes[0]).replace("lora_B.weight", suffixes[1])
            weights[prefixes[part] + name] = value
    save_file(weights, tmp_path / "lora.safetensors")
    assert_fused(pipeline, tmp_path / "lora.safetensors", loras, {"lora_alpha": 2})


@pytest.mark.parametrize("name", ["lora_unet_{}", "lora_unet_base_model_model_{}"])
def test_the_lcm_scripts_conversion_to_kohyas_names_is_read(pipeline, tmp_path, name):
    lora, weights = of_parts(pipeline, ["unet"])["unet"], {}
    for key, value in lora.items():
        path, kind = key.split(".lora_")
        name_of_it = name.format(path.replace(".", "_"))
        weights[f"{name_of_it}.lora_{'down' if kind[0] == 'A' else 'up'}.weight"] = value
        weights[f"{name_of_it}.alpha"] = torch.tensor(6.0)
    save_file(weights, tmp_path / "lcm.safetensors")
    assert_fused(pipeline, tmp_path / "lcm.safetensors", {"unet": lora}, {"lora_alpha": 6})


@pytest.mark.parametrize("make", [make_small_pipeline, tiny_sdxl_pipeline])
def test_doras_of_text_encoders_are_fused_with_their_magnitudes(make, tmp_path):
    pipeline = make()
    parts = [part for part in TARGETS if getattr(pipeline, part, None) is not None]
    loras = of_parts(pipeline, parts, dora=True)
    weights = {f"{part}.{key}": value for part, lora in loras.items() for key, value in lora.items()}
    save_file(weights, tmp_path / "dora.safetensors")
    assert_fused(pipeline, tmp_path / "dora.safetensors", loras, {"lora_alpha": 2}, 0.7)


def test_embeddings_beside_a_lora_are_left_out_with_a_line(tmp_path, caplog):
    """OneTrainer's files; a token may hold spaces."""
    pipeline, stock = tiny_sdxl_pipeline(), tiny_sdxl_pipeline()
    file = kohya_file(pipeline, {"unet": draw_pairs(pipeline.unet, 0)}, tmp_path / "kohya.safetensors")
    embeddings = {f"bundle_emb.ema yasuhara.clip_{which}": torch.randn(2, 16) for which in "lg"}
    save_file(load_file(file) | embeddings, tmp_path / "onetrainer.safetensors")
    fuse_loras(stock, [{"path": str(file)}])
    with caplog.at_level(logging.WARNING, "slimstep"):
        fuse_loras(pipeline, [{"path": str(tmp_path / "onetrainer.safetensors")}])
    assert "its embeddings of ema yasuhara are left out" in caplog.text
    ours, theirs = pipeline.unet.state_dict(), stock.unet.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


KINDS = {
    "a LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], "a LoKr": ["lokr_w1", "lokr_w2"],
    "an OFT": ["oft_blocks"], "a full difference of weights": ["diff", "diff_b"], "an IA3": ["weight", "on_input"],
    "a GLoRA": ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    "a LoCon with a Tucker core": ["lora_mid.weight", "lora_down.weight", "lora_up.weight"],
    "a DoRA of kohya's or LyCORIS' kind": ["dora_scale", "lora_down.weight", "lora_up.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_kind_is_named_in_a_short_line(pipeline, tmp_path, kind):
    paths = [path.replace(".", "_") for path in draw_pairs(pipeline.unet, 0)]
    weights = {f"lora_unet_{path}.{name}": torch.ones(2, 2) for path in paths for name in (*KINDS[kind], "alpha")}
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"other.safetensors cannot be fused: it is {kind}.*only LoRAs") as caught:
        fuse_loras(pipeline, [{"path": str(tmp_path / "other.safetensors")}])
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_pefts_other_kinds_and_beginnings_are_named(pipeline, tmp_path):
    lora = of_parts(pipeline, ["unet"])["unet"]
    for fields, message in {"it is PEFT's LOKR": {"peft_type": "LOKR"}, "it began as pissa_niter_4": {
        "init_lora_weights": "pissa_niter_4"}}.items():  # fmt: skip
        with pytest.raises(ValueError, match=fields):
            fuse_lora(pipeline, write_peft(tmp_path / "adapter", lora, lora_alpha=4, **message))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda w: {key.replace("lora_B", "lora_C"): v for key, v in w.items()}, "no pairs: .* and [0-9]+ more"),
    (lambda w: {key: v for key, v in w.items() if "lora_A" in key}, "[0-9]+ weights make no pairs"),
    (lambda w: {f"model.diffusion_model.{key}": v for key, v in w.items()}, "does not say for which network|no LoRA"),
    (lambda w: {"bundle_emb.x.clip_l": torch.ones(1)}, "it is empty"),
    (lambda w: {key: v[:, :1].clone() for key, v in w.items()}, r"unet\..*its weights are .*: it is for another model"),
    (lambda w: {key: v * float("nan") for key, v in w.items()}, "the sum of its weights and the LoRA's is not finite"),
    (lambda w: w | {f"text_encoder.encoder.layers.9.mlp.fc1.lora_{n}.weight": torch.ones(2, 2) for n in "AB"},
     "no weights for this text_encoder; it adapts text_encoder.encoder.layers.9.mlp.fc1"),
    (lambda w: {f"unet.there_is.none.{key}": v for key, v in w.items()}, "no weights for this UNet; it adapts .* more"),
])  # fmt: skip
def test_what_is_no_lora_for_this_model_is_one_bounded_line(pipeline, tmp_path, damage, message):
    save_file(damage(of_parts(pipeline, ["unet"])["unet"]), tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        fuse_loras(pipeline, [{"path": str(tmp_path / "bad.safetensors")}])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700 + len(str(tmp_path))


def test_of_a_folder_with_several_files_none_is_taken_by_chance(pipeline, tmp_path):
    loras = of_parts(pipeline, ["unet"])
    for name in ("one", "two"):
        save_file({f"unet.{key}": value for key, value in loras["unet"].items()}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="it holds one.safetensors, two.safetensors: name the one file"):
        fuse_loras(pipeline, [{"path": str(tmp_path)}])
    (tmp_path / "two.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert_fused(pipeline, tmp_path, loras, {"lora_alpha": 2})


def test_a_lora_is_fused_without_peft(pipeline, tmp_path, monkeypatch):
    """Whose releases, and those of transformers, refuse each other at times."""
    loras = of_parts(pipeline, ["unet", "text_encoder"])
    weights = {f"{part}.{key}": value for part, lora in loras.items() for key, value in lora.items()}
    save_file(weights, tmp_path / "lora.safetensors")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_fused(pipeline, tmp_path / "lora.safetensors", loras, {"lora_alpha": 2})
