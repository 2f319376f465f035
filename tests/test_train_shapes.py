"""The recipe of the bundled transformer: it trains what the stock pipeline draws, and packs a folder for it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

from scripts.shapes_recipe import CachedScenes, Recipe, load_newest
from scripts.shapes_transformer import TextToImageFlow
from scripts.shapes_transformer_evaluation import draw, evaluate_transformer, noise, without_block
from slimstep.data.shapes import ShapesPairs, caption
from slimstep.engine.files import write_tensors

REPOSITORY = Path(__file__).parents[1]
CAPTIONS = ["a small red ring inside a large cyan circle", "two blue crosses on a white background"]
SMALL = (
    "shipped=[vae,scorer,unet]", "transformer.model={num_layers:3,num_attention_heads:2,attention_head_dim:16}",
    "transformer.train.batch_size=4", "transformer.train.learning_rate=3e-3", "transformer.train.warmup_steps=0",
    "transformer.train.ema_decay=0.5", "transformer.train.checkpoint_every=2",
    "transformer.decay.batch_size=4", "transformer.decay.steps=2",
)  # fmt: skip


def recipe(root: Path, *overrides: str) -> Recipe:
    """A small model whose assets lie under `root`, beside latents of eight captions that are all alike and flat."""
    if not (root / "assets").exists():
        for name in ("shapes", "shapes-clip"):
            shutil.copytree(REPOSITORY / "assets" / name, root / "assets" / name)
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base=None):
        config = compose("train_shapes", [f"root={root}", f"assets={root / 'assets'}", *SMALL, *overrides])
    made = Recipe(config)
    ids = made.tokenizer([caption(*ShapesPairs("train", 8, 0).scene(n)) for n in range(8)], padding="max_length")
    latents = torch.randn(1, 4, 1, 1, generator=torch.Generator().manual_seed(0)).expand(8, 4, 16, 16)
    tensors = {"latents": latents.half(), "ids": torch.tensor(ids.input_ids).short()}
    write_tensors(root / "latents" / "latents.safetensors", tensors)
    return made


def shaken(model: TextToImageFlow) -> TextToImageFlow:
    """With modulations that are not zero, as after training."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if "norm" in name or "proj_out" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


@torch.no_grad()
def euler(model: TextToImageFlow, recipe: Recipe, x_BCHW, steps: int, guidance: float, padding: float):
    """Guided Euler steps on the stock scheduler's grid, by what is trained."""
    ids_BL, empty_ids_BL = recipe.flow_ids(CAPTIONS), recipe.flow_ids([""] * len(CAPTIONS))
    padding_B = torch.full((len(CAPTIONS),), padding)
    bounds = [*torch.linspace(1, 0.001, steps).tolist(), 0.0]
    for t, end in zip(bounds, bounds[1:], strict=False):
        t_B = torch.full((len(CAPTIONS),), 1000 * t)
        away, toward = (model(x_BCHW, t_B, ids, padding_B) for ids in (empty_ids_BL, ids_BL))
        x_BCHW = x_BCHW + (end - t) * (away + guidance * (toward - away))
    return x_BCHW


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Recipe, TextToImageFlow, StableDiffusion3Pipeline]:
    """The recipe, the model with the weights that were packed, and what stock diffusers makes of the folder."""
    made = recipe(tmp_path_factory.mktemp("packed"))
    model = shaken(made.flow_model())
    write_tensors(made.root / "transformer" / "train" / "weights.safetensors", model.state_dict())
    made.export_transformer()
    folder = made.shipped.with_name("shapes-dit")
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return made, model.half().float(), pipeline


def test_the_packed_folder_is_the_stock_pipeline_of_stable_diffusion_3(packed):
    _, _, pipeline = packed
    assert type(pipeline) is StableDiffusion3Pipeline
    assert pipeline.vae.config.shift_factor == 0
    assert pipeline.tokenizer.model_max_length == pipeline.tokenizer_2.model_max_length == 24


def test_the_third_text_encoder_gives_what_the_pipeline_gives_without_it(packed):
    _, _, pipeline = packed
    arguments = (CAPTIONS, None, None, torch.device("cpu"))
    with_it = pipeline.encode_prompt(*arguments)
    third, pipeline.text_encoder_3 = pipeline.text_encoder_3, None
    without = pipeline.encode_prompt(*arguments)
    pipeline.text_encoder_3 = third
    assert all(ours.equal(theirs) for ours, theirs in zip(with_it, without, strict=True))


@pytest.mark.parametrize("padding", [256, 1])
def test_stock_diffusers_draws_from_the_packed_folder_what_was_trained(packed, padding):
    made, model, pipeline = packed
    options = {"num_inference_steps": 3, "guidance_scale": 2.5, "max_sequence_length": padding}
    x_BCHW = noise(pipeline, [0, 1], seed=0)
    theirs = pipeline(CAPTIONS, latents=x_BCHW, output_type="latent", **options).images
    ours = euler(model, made, x_BCHW, 3, 2.5, padding)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    other = euler(model, made, x_BCHW, 3, 2.5, 257 - padding)
    assert (theirs - other).abs().max() > 1e-2  # the zeros are no matter of rounding


def test_the_first_text_encoder_gives_the_states_of_the_unets(packed):
    made, model, _ = packed
    ids_BL = made.flow_ids(CAPTIONS)
    model = made.flow_model()
    theirs = made.text_to_image().text_encoder(ids_BL, output_hidden_states=True).hidden_states[-1]
    ours = model.text_encoder(ids_BL, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours * model.text_scale, theirs, atol=1e-3, rtol=1e-4)


def test_a_block_that_is_passed_by_is_a_block_that_is_removed(packed):
    _, _, pipeline = packed
    whole = draw(pipeline, CAPTIONS, 2, 2.0, 0, 1)
    with without_block(pipeline.transformer, 1):
        masked = draw(pipeline, CAPTIONS, 2, 2.0, 0, 1)
    blocks = pipeline.transformer.transformer_blocks
    pipeline.transformer.transformer_blocks = torch.nn.ModuleList([blocks[0], blocks[2]])
    removed = draw(pipeline, CAPTIONS, 2, 2.0, 0, 1)
    pipeline.transformer.transformer_blocks = blocks
    assert masked.equal(removed) and draw(pipeline, CAPTIONS, 2, 2.0, 0, 1).equal(whole) and not masked.equal(whole)


def test_the_evaluation_compares_with_real_images_and_scores_every_block(packed):
    made, _, _ = packed
    small = {"prompts": 4, "steps": 2, "guidance": [2], "few_steps": [1], "padding": 2, "seed": 1,
             "blocks": {"prompts": 3, "steps": 1, "guidance": 1}}  # fmt: skip
    pictures = made.root / "pictures"
    report = evaluate_transformer(made.shipped.parent, OmegaConf.create(small), pictures)
    assert report["clip"]["real through VAE"]["mean"] > 50 and len(report["clip"]) == len([*pictures.iterdir()]) == 5
    assert [loss["block"] for loss in report["blocks"]["lost"]] == [0, 1, 2]
    json.dumps(report)


def test_the_loss_of_the_flow_falls_and_the_weights_that_are_shared_stay(tmp_path):
    made = recipe(tmp_path, "transformer.train.steps=20", "transformer.train.checkpoint_every=100")
    made.transformer()
    lines = (made.root / "transformer" / "metrics.jsonl").read_text().splitlines()
    loss = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert loss[1] < 0.8 * loss[0], loss
    model = made.flow_model()
    begun = {name: weight.clone() for name, weight in model.state_dict().items()}
    load_newest(model, made.root / "transformer" / "decay")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and all(model.state_dict()[name].equal(begun[name]) for name in frozen)


@pytest.mark.slow
def test_a_killed_training_continues_as_if_uninterrupted(tmp_path, monkeypatch):
    final = {}
    for name in ("whole", "killed"):
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(CachedScenes, "collate", killed_at(4))
                with pytest.raises(KeyboardInterrupt):
                    recipe(tmp_path / name, "transformer.train.steps=5").transformer()
            assert [*(tmp_path / name / "transformer" / "train" / "checkpoints").glob("step-*")]
        made = recipe(tmp_path / name, "transformer.train.steps=5")
        made.transformer()
        final[name] = load_file(made.root / "transformer" / "decay" / "weights.safetensors")
    assert all(final["whole"][name].equal(weight) for name, weight in final["killed"].items())


def killed_at(call: int):
    """`CachedScenes.collate` whose nth call does not come back."""
    whole, calls = CachedScenes.collate, iter(range(1, 1000))

    def collate(self, indices):
        if next(calls) == call:
            raise KeyboardInterrupt
        return whole(self, indices)

    return collate
