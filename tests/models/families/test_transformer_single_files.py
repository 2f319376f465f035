"""Single files of transformers: what a folder holds, under the names that other programs keep it under."""

import json

import pytest
import torch
from safetensors.torch import save_file

from slimstep.models.convert import convert
from slimstep.models.families.transformer.single_file import names_in
from slimstep.models.family import FAMILIES, family_at
from slimstep.models.pipeline import check_pipeline, load_pipeline
from tests.jobs import run_job
from tests.models.families.small import PIPELINES, run

SD3_BLOCK = {
             "norm1.linear": "x_block.adaLN_modulation.1", "norm1_context.linear": "context_block.adaLN_modulation.1",
             "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
             "attn2.to_out.0": "x_block.attn2.proj",
             "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
             "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
             "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
             "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
             "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
}  # fmt: skip
SD3_REST = {"pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
            "context_embedder": "context_embedder",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2"}  # fmt: skip
QKV = {"x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
       "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
       "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")}  # fmt: skip


def swapped(weight: torch.Tensor) -> torch.Tensor:
    """The original has shift before scale where diffusers has scale before shift."""
    return torch.cat(weight.chunk(2)[::-1])


def original_sd3(weights: dict[str, torch.Tensor], last: int) -> dict[str, torch.Tensor]:
    """The weights under Stability AI's names, by hand."""
    made = {"pos_embed": weights["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        made |= {f"{new}.{kind}": weights[f"{old}.{kind}"] for old, new in SD3_REST.items()}
        made[f"final_layer.adaLN_modulation.1.{kind}"] = swapped(weights[f"norm_out.linear.{kind}"])
        for i in range(last + 1):
            block, there = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            for old, new in SD3_BLOCK.items():
                if (value := weights.get(f"{block}.{old}.{kind}")) is not None:
                    is_last = i == last and old == "norm1_context.linear"
                    made[f"{there}.{new}.{kind}"] = swapped(value) if is_last else value
            for new, parts in QKV.items():
                if f"{block}.{parts[0]}.{kind}" in weights:
                    made[f"{there}.{new}.qkv.{kind}"] = torch.cat([weights[f"{block}.{p}.{kind}"] for p in parts])
    return made


@pytest.fixture(scope="module", params=["SD3", "SD3.5", "FLUX", "Sana", "Qwen-Image", "Wan"])
def saved(request, tmp_path_factory):
    """{family, folder, weights}: a pipeline, and its network's weights under diffusers' names."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline = PIPELINES[request.param]()
    pipeline.save_pretrained(folder)
    return request.param, folder, {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}


def loaded_alike(file, folder) -> bool:
    ours, theirs = load_pipeline(file, single_file_config=str(folder)), load_pipeline(folder)
    for pipeline in (ours, theirs):
        pipeline.transformer.register_to_config(sample_size=8)
    parts = [(name, part) for name, part in theirs.components.items() if isinstance(part, torch.nn.Module)]
    for name, part in parts:
        own = getattr(ours, name).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in part.state_dict().items()), name
    return torch.equal(run(ours.transformer), run(theirs.transformer))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_with_diffusers_names_is_its_folder(saved, prefix, tmp_path):
    family, folder, weights = saved
    save_file({f"{prefix}{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    assert family_at(tmp_path / "model.safetensors") is family_at(folder)
    assert [f.is_in(names_in(tmp_path / "model.safetensors")) for f in FAMILIES].count(True) == 1
    assert loaded_alike(tmp_path / "model.safetensors", folder)


@pytest.mark.parametrize("family", ["SD3", "SD3.5"])
def test_a_file_in_the_original_layout_is_its_folder(family, tmp_path, caplog):
    """diffusers' converter of FLUX knows FLUX's own width alone, too large for a test."""
    pipeline, folder = PIPELINES[family](), tmp_path / "model"
    pipeline.save_pretrained(folder)
    weights = pipeline.transformer.state_dict()
    last = len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")}) - 1
    made = {f"model.diffusion_model.{name}": value.contiguous() for name, value in original_sd3(weights, last).items()}
    save_file({**made, "first_stage_model.encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert family_at(tmp_path / "model.safetensors") is family_at(folder)
    assert loaded_alike(tmp_path / "model.safetensors", folder)
    assert "holds more than a transformer, first_stage_model.encoder" in caplog.text


def test_weights_of_another_size_are_an_error(saved, tmp_path):
    _, folder, weights = saved
    file, config = tmp_path / "model.safetensors", {"single_file_config": str(folder)}
    blocks = next(iter(family_at(folder).NETWORK.LISTS))
    last = max(name.split(".")[1] for name in weights if name.startswith(f"{blocks}."))
    own = [name for name in weights if name.startswith(f"{blocks}.{last}.")]
    more = {name.replace(f".{last}.", f".{int(last) + 1}.", 1): weights[name].clone() for name in own}
    save_file({**weights, **more}, file)
    with pytest.raises(ValueError, match=f"it holds {len(own)} more weights, {blocks}.{int(last) + 1}."):
        load_pipeline(file, **config)
    name = next(iter(weights))
    save_file({**weights, name: torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=rf"does not belong to .*transformer/config.json: {name} is \(3,\), not"):
        load_pipeline(file, **config)


def test_a_file_asks_for_the_model_of_its_other_parts(saved, tmp_path, tiny_pipeline_folder):
    family, folder, weights = saved
    file = tmp_path / "model.safetensors"
    save_file(weights, file)
    with pytest.raises(ValueError, match="model.single_file_config=FOLDER_OR_HUB_ID names the diffusers model that"):
        check_pipeline(file)
    with pytest.raises(ValueError, match="lacks|names no transformer|which it lacks"):
        check_pipeline(file, single_file_config=str(tiny_pipeline_folder))
    if family == "FLUX":
        PIPELINES["SD3"]().save_pretrained(tmp_path / "sd3")
        with pytest.raises(ValueError, match="a StableDiffusion3Pipeline with another network"):
            check_pipeline(file, single_file_config=str(tmp_path / "sd3"))


def test_diffusers_reads_no_single_files_of_pixart(tmp_path):
    pipeline = PIPELINES["PixArt"]()
    save_file(pipeline.transformer.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="PixArtTransformer2DModel, which diffusers does not read: give its diffusers"):
        check_pipeline(tmp_path / "model.safetensors", single_file_config=str(tmp_path))


def test_a_file_becomes_a_folder_and_no_folder_a_file(tmp_path):
    pipeline = PIPELINES["SD3"]()
    pipeline.save_pretrained(tmp_path / "model")
    save_file(pipeline.transformer.state_dict(), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "made", config=str(tmp_path / "model"))
    assert loaded_alike(tmp_path / "model.safetensors", tmp_path / "made")
    with pytest.raises(ValueError, match="has a SD3Transformer2DModel; single files are written of Stable Diffusion's"):
        convert(tmp_path / "made", tmp_path / "other.safetensors")


@pytest.mark.slow
def test_a_job_runs_on_a_single_file(tmp_path, tiny_clip_folder):
    pipeline = PIPELINES["SD3"]()
    pipeline.save_pretrained(tmp_path / "model")
    save_file(pipeline.transformer.state_dict(), tmp_path / "model.safetensors")
    model = [f"model.name_or_path={tmp_path}/model.safetensors", f"model.single_file_config={tmp_path}/model"]
    scorer = ["scorer=openclip", f"scorer.model=local-dir:{tiny_clip_folder}", "scorer.pretrained=null"]
    small = ["name=evaluate", "eval.prompts=4", "curves.steps=[1]", "curves.guidance=[1]", "scorer.force=true"]
    done = run_job("+experiment=evaluate", "model=path", *model, f"root={tmp_path}/runs", *scorer, *small)
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "runs/evaluate/evaluation.json").read_text())["points"]
    assert [point["steps"] for point in points] == [1]
