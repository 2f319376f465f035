"""A LoRA of the full model does on a pruned export, block by block, what it does on the full model."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scripts.random_transformers import small_flux_pipeline, small_sd3_pipeline
from scripts.remap import main
from slimstep.models.card import read_export_report
from slimstep.models.families.transformer.networks.flux import PrunableFluxTransformer2DModel
from slimstep.models.families.transformer.networks.sd3 import PrunableSD3Transformer2DModel
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.networks import network_of, with_unet
from slimstep.models.pipeline import export_pipeline, load_pipeline
from slimstep.models.remap import remap
from tests.loras import draw_lora
from tests.tiny import small_pipeline

# {name: a pipeline, its prunable class, an architecture, modules that the LoRA changes}
MODELS = {
    "SD3": (
        small_sd3_pipeline, PrunableSD3Transformer2DModel,
        {"transformer_blocks.0": 2, "transformer_blocks.2": 0, "transformer_blocks.4": 0},
        ("to_q", "to_add_out", "norm1_context.linear", "ff.net.2", "proj_out"),
    ),
    "FLUX": (
        small_flux_pipeline, PrunableFluxTransformer2DModel,
        {"transformer_blocks.0": 0, "single_transformer_blocks.1": 0}, ("to_q", "proj_mlp", "x_embedder"),
    ),
    "a UNet with its class file": (
        small_pipeline, PrunableUNet2DConditionModel,
        {"mid_block.attentions.0": 0, "down_blocks.0.attentions.0": 2}, ("to_q", "conv1", "conv_in"),
    ),
    "a stock UNet": (
        small_pipeline, PrunableUNet2DConditionModel, {"mid_block.attentions.0": 0, "mid_block.resnets.0": 0},
        ("to_q", "conv1", "conv_in"),
    ),
}  # fmt: skip


def kohya(key: str) -> str:
    path, _, half = key.rpartition(".lora_")
    return f"lora_unet_{path.replace('.', '_')}.lora_{'down' if half.startswith('A') else 'up'}.weight"


def before_peft(key: str) -> str:
    """As diffusers wrote the LoRAs of attentions first; other modules as now."""
    path, _, half = key.rpartition(".lora_")
    attention, _, name = path.rpartition(".to_")
    plain = f"{attention}.processor.to_{name}_lora" if attention else f"{path}.lora"
    return f"unet.{plain}.{'down' if half.startswith('A') else 'up'}.weight"


NAMES = {"diffusers": lambda key: f"transformer.{key}", "PEFT": lambda key: f"base_model.model.{key}", "kohya": kohya,
         "diffusers of before PEFT": before_peft}  # fmt: skip


def with_lora(network, lora):
    """The network with the updates of a LoRA in plain paths added to its weights."""
    with torch.no_grad():
        for key in [key for key in lora if ".lora_A." in key]:
            weight = network.get_submodule(key.partition(".lora_A.")[0]).weight
            weight += update_of(lora, key).view_as(weight)
    return network


def update_of(lora, down):
    return lora[down.replace("lora_A", "lora_B")].flatten(1) @ lora[down].flatten(1)


def unnamed(lora, network):
    """A LoRA of any of NAMES in plain paths of this network."""
    plain = {}
    for path, _ in network.named_modules():
        for half in ("lora_A.weight", "lora_B.weight"):
            plain |= {f"{path}.{half}": lora[new] for name in NAMES.values() if (new := name(f"{path}.{half}")) in lora}
    assert len(plain) == len(lora)
    return plain


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """The full network, an export of a pruned one, a LoRA of the full one in plain paths, and the network of an export
    that was pruned after the LoRA was added."""
    make, kind, architecture, targets = MODELS[request.param]
    pipeline, folder = make(), tmp_path_factory.mktemp("remap")
    full = kind.from_unet(network_of(pipeline))
    lora = draw_lora(full, targets)
    for name, network in {"export": full, "expected": with_lora(kind.from_unet(full), lora)}.items():
        pruned = network.with_architecture(architecture, copy_init="same")
        export_pipeline(with_unet(pipeline, pruned), folder / name)
    return full, folder / "export", lora, network_of(load_pipeline(folder / "expected"))


@pytest.mark.parametrize("names", NAMES)
def test_it_changes_each_block_as_in_the_full_model(model, tmp_path, names):
    full, export, lora, expected = model
    if NAMES[names] is before_peft and not isinstance(full, PrunableUNet2DConditionModel):
        pytest.skip("these names are of UNets alone")
    save_file({NAMES[names](key): value for key, value in lora.items()}, tmp_path / "lora.safetensors")
    remap(tmp_path / "lora.safetensors", export, tmp_path / "new.safetensors")
    network = network_of(load_pipeline(export))
    changed = with_lora(network, unnamed(load_file(tmp_path / "new.safetensors"), network))
    torch.testing.assert_close(changed.state_dict(), expected.state_dict())


def test_what_falls_away_is_said_with_its_share_of_the_norm(model, tmp_path):
    full, export, lora, _ = model
    lora = {key: value for key, value in lora.items() if "norm1_context" not in key and "to_add_out" not in key}
    save_file(lora, tmp_path / "lora.safetensors")
    done = remap(tmp_path / "lora.safetensors", export, tmp_path / "new.safetensors")
    went = read_export_report(export)["blocks"]
    gone = [block for block in full.all_blocks if not went[block]]
    downs = [key for key in lora if ".lora_A." in key]
    norms = {key.partition(".lora_A.")[0]: update_of(lora, key).norm() for key in downs}
    fallen = {path: norm for path, norm in norms.items() if path.startswith(tuple(f"{block}." for block in gone))}
    share = torch.stack([*fallen.values()]).norm() / torch.stack([*norms.values()]).norm()
    assert sum(done.gone.values()) == len(fallen) and set(done.gone) <= set(gone) and 0 < share < 1
    assert done.lost == pytest.approx(share.item(), rel=1e-5)


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_what_a_narrower_module_cannot_take_falls_away(tmp_path, names):
    pipeline = small_pipeline()
    whole = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    narrow = {"down_blocks.0.attentions.0": {"widths": {"attn1": 0.5, "ff": 0.25}},
              "mid_block.resnets.0": {"widths": {"channels": 0.5}}}  # fmt: skip
    pipeline.unet = whole.with_architecture(narrow)
    export_pipeline(pipeline, tmp_path / "export")
    lora = draw_lora(whole, ("to_q", "conv1", "conv2", "ff.net.2", "conv_in"))
    save_file({NAMES[names](key): value for key, value in lora.items()}, tmp_path / "lora.safetensors")
    found = remap(tmp_path / "lora.safetensors", tmp_path / "export", tmp_path / "new.safetensors")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0"
    narrower = {f"{layer}.attn1.to_q", f"{layer}.ff.net.2", "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"}
    kept = {key for key in lora if key.rpartition(".lora_")[0] not in narrower}
    written = load_file(tmp_path / "new.safetensors")
    assert written.keys() == {NAMES[names](key) for key in kept} and sum(found.gone.values()) == 4
    stripped = {key: value for key, value in lora.items() if key in kept}
    with_lora(load_pipeline(tmp_path / "export").unet, stripped)  # whose shapes fit


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """An export of a FLUX whose first double block and second single block are gone."""
    pipeline, folder = small_flux_pipeline(), tmp_path_factory.mktemp("flux") / "export"
    full = PrunableFluxTransformer2DModel.from_unet(pipeline.transformer)
    architecture = {"transformer_blocks.0": 0, "single_transformer_blocks.1": 0, "transformer_blocks.2": 2}
    export_pipeline(with_unet(pipeline, full.with_architecture(architecture)), folder)
    return folder


def test_names_of_the_original_layout_and_alphas_are_renamed(flux, tmp_path):
    names = [
        "lora_unet_double_blocks_1_img_attn_qkv", "lora_unet_double_blocks_2_img_mlp_0",
        "lora_unet_single_blocks_1_linear1", "diffusion_model.single_blocks.0.linear2", "lora_te1_text_layers_1",
    ]  # fmt: skip
    pair = {"lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(1.0)}
    stored = {f"{name}.{half}": value.clone() for name in names for half, value in pair.items()}
    save_file(stored, tmp_path / "lora.safetensors")
    done = remap(tmp_path / "lora.safetensors", flux, tmp_path / "new.safetensors")
    assert {key.rpartition(".lora_up")[0] for key in load_file(tmp_path / "new.safetensors") if "lora_up" in key} == {
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_1_img_mlp_0",
        "lora_unet_double_blocks_2_img_mlp_0", "diffusion_model.single_blocks.0.linear2", "lora_te1_text_layers_1",
    }  # fmt: skip
    assert done.gone == {"single_transformer_blocks.1": 1} and done.modules == 5
    assert done.lost == pytest.approx(5**-0.5)


def test_settings_of_single_modules_in_the_metadata_are_renamed(flux, tmp_path):
    settings = {
        "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_q": 8, "transformer_blocks.0.attn.to_q": 4},
        "transformer.target_modules": ["transformer_blocks.2.attn.to_q", "x_embedder"], "transformer.r": 2,
    }  # fmt: skip
    metadata = {"lora_adapter_metadata": json.dumps(settings), "format": "pt", "note": "{not JSON"}
    tensors = {"transformer.transformer_blocks.1.attn.to_q.lora_A.weight": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    remap(tmp_path / "lora.safetensors", flux, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["note"]) == ("pt", "{not JSON")
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "transformer.alpha_pattern": {"transformer_blocks.0.attn.to_q": 8}, "transformer.r": 2,
        "transformer.target_modules": [
            "transformer_blocks.1.attn.to_q", "transformer_blocks.2.attn.to_q", "x_embedder",
        ],
    }  # fmt: skip


def test_the_command_says_what_falls_away_and_replaces_nothing(flux, tmp_path, monkeypatch, capsys):
    rows, columns = load_pipeline(flux).transformer.transformer_blocks[0].attn.to_q.weight.shape
    pair = {"lora_A.weight": torch.ones(2, columns), "lora_B.weight": torch.ones(rows, 2)}
    save_file({f"transformer.transformer_blocks.{i}.attn.to_q.{half}": value.clone() for i in (0, 1)
               for half, value in pair.items()}, tmp_path / "lora.safetensors")  # fmt: skip
    words = ["remap.py", *map(str, (tmp_path / "lora.safetensors", flux, tmp_path / "new.safetensors"))]
    monkeypatch.setattr(sys, "argv", words)
    main()
    printed = capsys.readouterr().out
    assert "gone: transformer_blocks.0, 1 module of the LoRA" in printed
    assert "new.safetensors: 1 modules; 1 fell away, 70.7% of the norm of its updates" in printed
    with pytest.raises(SystemExit):
        main()
    assert "new.safetensors exists; --force replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "message"), [
    ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "Stable Diffusion's original files .*upon the full model"),
    ("lora_te_text_model_layers_0.lora_down.weight", "names no block of the model"),
    ("controlnet_blocks.0.weight", "is a ControlNet .*train one for the pruned model"),
])  # fmt: skip
def test_names_that_cannot_be_read_are_an_error(flux, tmp_path, key, message):
    save_file({key: torch.ones(2, 3)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message):
        remap(tmp_path / "lora.safetensors", flux, tmp_path / "new.safetensors")


def test_what_is_no_lora_or_no_export_is_an_error(flux, tmp_path):
    (tmp_path / "lora.safetensors").write_text("text")
    with pytest.raises(ValueError, match="lora.safetensors is no file of safetensors"):
        remap(tmp_path / "lora.safetensors", flux, tmp_path / "new.safetensors")
    save_file({"transformer_blocks.1.to_q.lora_A.weight": torch.ones(2, 3)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="does not say where the blocks of the full model went"):
        remap(tmp_path / "lora.safetensors", tmp_path, tmp_path / "new.safetensors")
