"""LoRAs as other programs name them: the fused weights are W + scale · α/r · B A, computed by hand.

Axes: O outputs of a module, I its inputs, times a convolution's kernel.
"""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.lora import fuse_lora, fuse_loras
from slimstep.models.original_layout import unet_name
from slimstep.models.pipeline import with_unet
from tests.loras import draw_lora
from tests.models.conftest import make_small_pipeline
from tests.tiny import tiny_sdxl_pipeline

RANKS, ALPHAS, SCALE = (1, 2, 3), (0.5, 1.0, 4.0, 6.0), 0.7
PARTS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def prunable(pipeline, architecture=()):
    return with_unet(pipeline, PrunableUNet2DConditionModel.from_unet(pipeline.unet, dict(architecture)))


def draw_pairs(network, seed):
    """{path: (A, B, α)} for every linear layer and convolution, with ranks and alphas that differ between them."""
    draw, pairs = torch.Generator().manual_seed(seed), {}
    layers = [(path, m.weight) for path, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for i, (path, weight) in enumerate(layers):
        rank = RANKS[i % 3]
        kernel = weight.shape[2:]
        a = torch.randn(rank, weight.shape[1], *kernel, generator=draw)
        b = torch.randn(weight.shape[0], rank, *(1 for _ in kernel), generator=draw)
        pairs[path] = a, b, ALPHAS[i % 4]
    return pairs


def expected(network, pairs):
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    for path, (a, b, alpha) in pairs.items():
        delta = (b.flatten(1) @ a.flatten(1)).view_as(weights[f"{path}.weight"])
        weights[f"{path}.weight"] += SCALE * alpha / len(a) * delta
    return weights


def kohya_name(part, path, pipeline):
    """`lora_unet_…` with underscores; SDXL's UNet under its original names; `text_model` where transformers had it."""
    if part == "unet" and "XL" in type(pipeline).__name__:
        path = unet_name(f"{path}.weight", pipeline.unet.state_dict(), 2).removesuffix(".weight")
    if part != "unet" and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"
    prefix = PARTS[part] if "XL" in type(pipeline).__name__ else PARTS[part].replace("te1", "te")
    return f"{prefix}_{path.replace('.', '_')}"


def kohya_file(pipeline, pairs, file):
    weights = {}
    for part, of_part in pairs.items():
        for path, (a, b, alpha) in of_part.items():
            name = kohya_name(part, path, pipeline)
            weights |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
            weights[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(weights, file)
    return file


def assert_fused(pipeline, file, target):
    fuse_loras(pipeline, [{"path": str(file), "scale": SCALE}])
    for part, weights in target.items():
        fused = getattr(pipeline, part).state_dict()
        assert fused.keys() == weights.keys()
        for key in fused:
            torch.testing.assert_close(fused[key], weights[key], rtol=1e-5, atol=1e-5, msg=f"{part}.{key}")


@pytest.mark.parametrize("make", [make_small_pipeline, tiny_sdxl_pipeline])
def test_kohyas_loras_reach_every_module_at_its_own_alpha(make, tmp_path):
    pipeline = make()
    parts = [part for part in PARTS if getattr(pipeline, part, None) is not None]
    pairs = {part: draw_pairs(getattr(pipeline, part), seed) for seed, part in enumerate(parts)}
    file = kohya_file(pipeline, pairs, tmp_path / "kohya.safetensors")
    assert_fused(prunable(pipeline), file, {part: expected(getattr(pipeline, part), pairs[part]) for part in parts})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_alphas_of_half_precision_are_exact(dtype, tmp_path):
    pipeline = make_small_pipeline()
    pairs = {path: (a.to(dtype), b.to(dtype), 5.0) for path, (a, b, _) in draw_pairs(pipeline.unet, 0).items()}
    file = kohya_file(pipeline, {"unet": pairs}, tmp_path / "half.safetensors")
    exact = {path: (a.float(), b.float(), alpha) for path, (a, b, alpha) in pairs.items()}
    assert_fused(prunable(pipeline), file, {"unet": expected(pipeline.unet, exact)})


def test_of_kohyas_lora_what_was_pruned_is_left_out_and_the_rest_is_right(tmp_path):
    pipeline, block = make_small_pipeline(), "down_blocks.1.attentions.0"
    pairs = draw_pairs(pipeline.unet, 0)
    file = kohya_file(pipeline, {"unet": pairs}, tmp_path / "kohya.safetensors")
    pruned = prunable(pipeline, {block: 0})
    kept = {path: pair for path, pair in pairs.items() if not path.startswith(f"{block}.")}
    target = expected(pruned.unet, kept)
    assert set(fuse_lora(prunable(pipeline, {block: 0}), file).left_out) == pairs.keys() - kept.keys()
    assert_fused(pruned, file, {"unet": target})


def test_a_lora_of_a_few_modules_of_the_text_encoder_is_read(tmp_path):
    pipeline = make_small_pipeline()
    for ends in (("q_proj", "v_proj"), ("fc1",), ("out_proj", "fc2")):
        pairs = draw_pairs(pipeline.text_encoder, 0)
        pairs = {path: pair for path, pair in pairs.items() if path.endswith(ends)}
        target = {"text_encoder": expected(pipeline.text_encoder, pairs)}
        file = kohya_file(pipeline, {"text_encoder": pairs}, tmp_path / "text.safetensors")
        assert_fused(prunable(make_small_pipeline()), file, target)


def test_old_names_of_attention_are_read(tmp_path):
    pipeline = make_small_pipeline()
    pairs = {path: (a, b, len(a)) for path, (a, b, _) in draw_pairs(pipeline.unet, 0).items() if ".to_" in path}
    weights = {}
    for path, (a, b, _) in pairs.items():
        place, _, name = path.removesuffix(".0").rpartition(".")
        key = f"unet.{place}.processor.{name}_lora"
        weights |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
    save_file(weights, tmp_path / "old.safetensors")
    assert_fused(prunable(pipeline), tmp_path / "old.safetensors", {"unet": expected(pipeline.unet, pairs)})


def test_names_of_several_kinds_in_one_file_are_read(tmp_path):
    """As diffusers' own scripts have written them, where diffusers goes by the first name alone."""
    pipeline = make_small_pipeline()
    pairs = {path: (a, b, len(a)) for path, (a, b, _) in draw_pairs(pipeline.unet, 0).items()}
    weights = {}
    for path, (a, b, _) in pairs.items():
        names = ("lora.down", "lora.up") if ".to_" in path else ("lora_A", "lora_B")
        weights |= {f"unet.{path}.{name}.weight": value for name, value in zip(names, (a, b), strict=True)}
    save_file(weights, tmp_path / "mixed.safetensors")
    assert_fused(prunable(pipeline), tmp_path / "mixed.safetensors", {"unet": expected(pipeline.unet, pairs)})


# ---- what only the metadata tells


def write_told(folder, parts, dora=False):
    """A LoRA of these parts whose alpha is in its metadata alone."""
    pipeline, layers = make_small_pipeline(), {}
    names = {"unet": ["to_q", "to_out.0", "conv1"], "text_encoder": ["q_proj", "fc1"]}
    alphas = {"unet": {"to_q": 3}, "text_encoder": {"fc1": 2}}
    for part in parts:
        network = getattr(pipeline, part)
        lora_fields = {"r": 4, "lora_alpha": 1, "alpha_pattern": alphas[part], "target_modules": names[part]}
        weights = draw_lora(network, names[part], lora_fields["r"], seed=3, dora=dora)
        layers[f"{part}_lora_layers"] = {key: value.abs() for key, value in weights.items()}
        layers[f"{part}_lora_adapter_metadata"] = LoraConfig(**lora_fields, use_dora=dora).to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("parts", [("unet",), ("text_encoder",), ("unet", "text_encoder")])
def test_alphas_of_the_metadata_are_those_of_diffusers(parts, tmp_path):
    file = write_told(tmp_path, parts)
    stock = make_small_pipeline()
    plain = {part: copy.deepcopy(getattr(stock, part).state_dict()) for part in parts}
    stock.load_lora_weights(file)
    stock.fuse_lora(components=list(parts), lora_scale=SCALE)
    stock.unload_lora_weights()
    target = {part: getattr(stock, part).state_dict() for part in parts}
    assert all(any(not torch.equal(plain[part][key], target[part][key]) for key in plain[part]) for part in parts)
    assert_fused(prunable(make_small_pipeline()), file, target)


def test_metadata_of_one_part_says_nothing_of_the_other(tmp_path):
    both, unet = write_told(tmp_path / "both", ("unet", "text_encoder")), write_told(tmp_path / "unet", ("unet",))
    with safe_open(unet, "pt") as opened:
        save_file(load_file(both), tmp_path / "told.safetensors", opened.metadata())
    save_file(load_file(both), tmp_path / "untold.safetensors")
    files = {"unet": both, "text_encoder": tmp_path / "untold.safetensors"}
    for part, file in files.items():
        alike = prunable(make_small_pipeline()), prunable(make_small_pipeline())
        for pipeline, source in zip(alike, (file, tmp_path / "told.safetensors"), strict=True):
            fuse_loras(pipeline, [{"path": str(source)}])
        own, other = (getattr(pipeline, part).state_dict() for pipeline in alike)
        assert all(torch.equal(own[key], other[key]) for key in own), part


def test_written_alphas_hold_for_a_pruned_unet(tmp_path):
    file, block = write_told(tmp_path, ("unet",)), "down_blocks.1.attentions.0"
    whole, pruned = prunable(make_small_pipeline()), prunable(make_small_pipeline(), {block: 0})
    for pipeline in (whole, pruned):
        fuse_loras(pipeline, [{"path": str(file)}])
    theirs = whole.unet.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in pruned.unet.state_dict().items())


def test_alphas_are_counted_once(tmp_path):
    """Where metadata tells them, too."""
    pipeline = make_small_pipeline()
    pairs = draw_pairs(pipeline.unet, 0)
    file = kohya_file(pipeline, {"unet": pairs}, tmp_path / "kohya.safetensors")
    save_file(load_file(file), file, {"lora_adapter_metadata": json.dumps({"unet.r": 1, "unet.lora_alpha": 8})})
    assert_fused(prunable(pipeline), file, {"unet": expected(pipeline.unet, pairs)})


# ---- DoRAs


def test_a_dora_whose_magnitudes_would_be_lost_is_refused(tmp_path):
    pipeline = make_small_pipeline()
    file = kohya_file(pipeline, {"unet": draw_pairs(pipeline.unet, 0)}, tmp_path / "dora.safetensors")
    weights = load_file(file)
    ups = {key: value for key, value in weights.items() if key.endswith(".lora_up.weight")}
    scales = {key.replace("lora_up.weight", "dora_scale"): torch.ones(1, len(value)) for key, value in ups.items()}
    save_file(weights | scales, file)
    with pytest.raises(ValueError, match="model.loras: .*dora.safetensors cannot be fused: it is a DoRA.*dora_scale"):
        fuse_loras(prunable(pipeline), [{"path": str(file)}])


def test_pefts_own_doras_are_fused_with_their_magnitudes(tmp_path):
    """W' = m (W + α/r · B A) / ‖W + α/r · B A‖, with norms over all but the outputs (Liu et al. 2024, equation 5)."""
    weights = load_file(write_told(tmp_path, ("unet",), dora=True))
    pipeline = prunable(make_small_pipeline())
    target = {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    for key in [key for key in weights if key.endswith(".lora_magnitude_vector")]:
        path = key.removeprefix("unet.").removesuffix(".lora_magnitude_vector")
        a, b = (weights[f"unet.{path}.lora_{name}.weight"] for name in "AB")
        alpha, weight = 3 if path.endswith("to_q") else 1, target[f"{path}.weight"]
        sum_OI = weight.flatten(1) + alpha / len(a) * b.flatten(1) @ a.flatten(1)
        weight.copy_((weights[key].view(-1, 1) * sum_OI / sum_OI.norm(dim=1, keepdim=True)).view_as(weight))
    fuse_loras(pipeline, [{"path": str(tmp_path / "pytorch_lora_weights.safetensors")}])
    for key, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, target[key], rtol=1e-5, atol=1e-5, msg=key)
