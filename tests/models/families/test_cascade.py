"""DeepFloyd IF's second stage behind its first: what it is conditioned on, its sampling, its training, its export."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

from scripts.random_deepfloyd import small_if_pipeline, small_if_second_pipeline, small_if_second_unet
from slimstep.distill.recovery import Recovery
from slimstep.engine.objective import STUDENT
from slimstep.engine.seeding import generator
from slimstep.eval.given import GivenModel, GivenModels
from slimstep.eval.refinement import OfPictures
from slimstep.eval.sampling import Sampler
from slimstep.eval.variance import VarianceKept, recorder_of
from slimstep.models.conditioning import Conditioning, conditioning_of
from slimstep.models.families.deepfloyd.cascade import degraded, first_stage_of, upscaled
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.family import denoiser_of, family_of, with_variance
from slimstep.models.guidance import guided
from slimstep.models.noise_schedule import schedule_of
from slimstep.models.pipeline import check_pipeline, export_pipeline, load_pipeline, with_unet
from slimstep.models.schedulers import swapped_scheduler

PROMPTS = ["a red cat", "Two DOGS & a bird", ""]
MID = "mid_block.attentions.0"


def small_unet() -> PrunableUNet2DConditionModel:
    return PrunableUNet2DConditionModel.from_unet(small_if_second_unet())


@pytest.fixture(scope="module")
def unet() -> PrunableUNet2DConditionModel:
    return small_unet()


def run(unet, **options) -> torch.Tensor:
    denoiser = with_variance(denoiser_of(unet))
    inputs = denoiser.example(unet, 3, tokens=7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return denoiser(unet, *inputs, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("cascade")
    small_if_pipeline().save_pretrained(place / "first")
    small_if_second_pipeline().save_pretrained(place / "second")
    return {name: str(place / name) for name in ("first", "second")}


def cascade(folders, **options) -> DiffusionPipeline:
    return load_pipeline(folders["second"], first_stage={"path": folders["first"], "steps": 3, **options})


@pytest.fixture
def pipeline(folders) -> DiffusionPipeline:
    return cascade(folders)


# ---- the network


def test_a_second_stages_unet_takes_the_picture_and_its_noise_level(unet):
    denoiser = denoiser_of(unet)
    x_t, t_B, cond = denoiser.example(unet, 3, tokens=7, generator=torch.Generator().manual_seed(1))
    assert denoiser.sample_shape == (3, 32, 32) and cond.tensors["upscaled"].shape == x_t.shape
    with torch.no_grad():
        ours = with_variance(denoiser)(unet, x_t, t_B, cond)
        inputs = torch.cat([x_t, cond.tensors["upscaled"]], dim=1)
        stock = small_if_second_unet()(inputs, t_B, cond.tensors["text"], class_labels=cond.tensors["noise_level"])
        other = denoiser(unet, x_t, t_B, Conditioning({**cond.tensors, "noise_level": t_B * 0}))
    assert torch.equal(ours, stock.sample) and not torch.equal(other, ours[:, :3])


def test_a_closed_mask_is_the_pruned_unet(unet):
    mask_BN = torch.rand(3, len(unet.kept_blocks), generator=torch.Generator().manual_seed(2)) < 0.6
    masked = run(unet, block_mask_BN=mask_BN)
    for row, open_N in enumerate(mask_BN.tolist()):
        closed = [block for block, is_open in zip(unet.kept_blocks, open_N, strict=True) if not is_open]
        assert torch.equal(run(unet.with_architecture(dict.fromkeys(closed, 0)))[row], masked[row])


# ---- what it is conditioned on


def some_cond(pictures: float) -> Conditioning:
    filled = {"upscaled": torch.full((2, 3, 4, 4), pictures), "noise_level": torch.tensor([7, 9])}
    return Conditioning({"text": torch.ones(2, 5, 8), **filled})


def test_an_empty_caption_has_the_picture_of_its_row():
    cond, empty = some_cond(3.0), Conditioning({"text": torch.zeros(1, 5, 8)})
    away = cond.emptied(empty)
    assert not away.tensors["text"].any() and torch.equal(away.tensors["upscaled"], cond.tensors["upscaled"])
    dropped = cond.where(torch.tensor([True, False]), empty)
    assert dropped.tensors["text"].flatten(1).sum(1).tolist() == [40, 0]
    assert torch.equal(dropped.tensors["noise_level"], torch.tensor([7, 9]))
    assert conditioning_of({**cond.tensors, "latents": 0}, like=empty).tensors.keys() == cond.tensors.keys()


def test_guidance_leads_away_from_the_empty_caption_beside_the_same_picture(unet):
    denoiser = denoiser_of(unet)
    x_t, t_B, cond = denoiser.example(unet, 2, tokens=7, generator=torch.Generator().manual_seed(1))
    empty = Conditioning({"text": torch.zeros(1, 7, cond.tensors["text"].shape[2])})
    with torch.no_grad():
        led, plain = guided(denoiser, unet, x_t, t_B, cond, empty, 3.0)
        text = torch.zeros_like(cond.tensors["text"])
        away = denoiser(unet, x_t, t_B, Conditioning({**cond.tensors, "text": text}))
    torch.testing.assert_close(led, away + 3 * (plain - away))


def test_images_are_shrunk_to_the_first_stages_size_enlarged_and_noised(pipeline):
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shown = degraded(pipeline, 16, images, torch.Generator().manual_seed(0))
    level_B, alphas = shown["noise_level"], pipeline.image_noising_scheduler.alphas_cumprod
    assert len(set(level_B.tolist())) > 1
    small = images.unflatten(3, (16, 2)).unflatten(2, (16, 2)).mean((3, 5))
    clean = upscaled(pipeline, small, torch.zeros_like(images), level_B * 0)["upscaled"] / alphas[0] ** 0.5
    alpha, sigma = (x.sqrt().view(-1, 1, 1, 1) for x in (alphas[level_B], 1 - alphas[level_B]))
    noise = (shown["upscaled"] - alpha * clean) / sigma
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


# ---- loading


def test_a_cascade_loads_with_its_first_stage_and_without_a_second_text_encoder(pipeline, folders):
    stage = first_stage_of(pipeline)
    assert family_of(pipeline).NAME.startswith("DeepFloyd IF") and type(pipeline) is IFSuperResolutionPipeline
    assert stage.pipeline.text_encoder is None and (stage.steps, stage.noise_level) == (3, 250)
    assert stage.protocol["path"] == folders["first"]
    assert first_stage_of(with_unet(pipeline, pipeline.unet)) is stage


def test_a_second_stage_alone_draws_nothing(folders):
    with pytest.raises(ValueError, match="model.first_stage={path: FOLDER, steps: 50"):
        Sampler(load_pipeline(folders["second"]), 2, 3.0).images(None, PROMPTS, [0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"path": "second"}, "is a IFSuperResolutionPipeline; the first stage is an IFPipeline"),
        ({"noise_level": 1000}, "must be 1 or more, and from 0 to 999"),
        ({"scheduler": "ddim"}, "has .'scheduler'.; it is {path: FOLDER_OR_ID} with"),
    ],
)
def test_what_is_no_first_stage_is_refused(folders, changes, reason):
    described = {"path": folders[changes.pop("path", "first")], **changes}
    with pytest.raises(ValueError, match=reason):
        load_pipeline(folders["second"], first_stage=described)


def test_a_first_stage_has_none_before_it(folders):
    with pytest.raises(ValueError, match="a IFPipeline has no stage before it"):
        load_pipeline(folders["first"], first_stage={"path": folders["first"]})


def test_each_of_several_models_has_the_first_stage_that_is_said_of_it_or_the_models(folders):
    """Of `models` of an evaluation or a benchmark, which are checked before anything is loaded."""
    first, path = folders["first"], folders["second"]
    named = {"teacher": path, "slow": {"path": path, "first_stage": {"path": first, "steps": 9}}}

    def given(named, first_stage) -> GivenModels:
        models = {name: GivenModel.of(name, value) for name, value in named.items()}
        return GivenModels(models, (2,), {"name_or_path": path, "first_stage": first_stage}, None)

    models = given(named, {"path": first, "steps": 3})
    models.check()
    assert [first_stage_of(models.load_named(name)).steps for name in named] == [3, 9]
    with pytest.raises(ValueError, match="makes pictures larger: model.first_stage={path"):
        given(named, None).check()
    with pytest.raises(ValueError, match="a IFPipeline has no stage before it"):
        given({"first": {"path": first, "first_stage": {"path": first}}}, None).check()
    assert first_stage_of(given({"slow": named["slow"]}, None).load(path)).steps == 9  # what a benchmark times


def test_a_second_stage_without_noise_levels_is_refused(tmp_path):
    small_if_second_pipeline().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "unet/config.json").read_text())
    (tmp_path / "unet/config.json").write_text(json.dumps({**fields, "class_embed_type": None}))
    with pytest.raises(ValueError, match="class_embed_type=None; that of an IFSuperResolutionPipeline takes how noisy"):
        check_pipeline(tmp_path)


# ---- sampling


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", [None, "ddim"])
def test_sampling_is_the_stock_pipelines(pipeline, scheduler, guidance_scale):
    if scheduler:
        pipeline.register_modules(scheduler=swapped_scheduler(pipeline.scheduler, scheduler))
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    call = {"guidance_scale": guidance_scale, "noise_level": 100, "output_type": "np"}
    draws = [generator("sample", 5, i) for i in range(3)]
    made = pipeline(PROMPTS, image=pictures, num_inference_steps=3, generator=draws, **call).images
    theirs = (torch.from_numpy(made) * 255).round().to(torch.uint8)

    sampler, draws = Sampler(pipeline, 3, guidance_scale, seed=5), [generator("sample", 5, i) for i in range(3)]
    first, noise = (torch.stack([torch.randn(3, 32, 32, generator=draw) for draw in draws]) for _ in range(2))
    shown = upscaled(pipeline, pictures, noise, torch.full((3,), 100))
    cond = Conditioning({**sampler.encode(PROMPTS).tensors, **shown})
    latents = sampler.latents(pipeline.unet, cond, first, generators=draws)
    assert torch.equal(sampler.decode(latents).permute(0, 2, 3, 1), theirs)


def test_pictures_are_those_of_the_first_stage_and_drawn_once(pipeline, folders):
    sampler, stage = Sampler(pipeline, 2, 3.0, seed=5), first_stage_of(pipeline)
    cond = sampler.conditions(PROMPTS, [2, 0, 2])
    assert len(stage.pictures) == 2 and torch.equal(*cond.tensors["upscaled"][[0, 2]])
    alone = load_pipeline(folders["first"])
    first = Sampler(alone, 3, stage.guidance_scale, seed=5)
    drawn = first.latents_at(alone.unet, first.encode(PROMPTS).rows([2, 0]), [2, 0])
    torch.testing.assert_close(torch.stack(list(stage.pictures.values())), drawn)
    before = dict(stage.pictures)
    sampler.images(pipeline.unet, PROMPTS, [0, 2])
    assert stage.pictures == before and len(stage.pictures) == 2
    sampler.reseeded(6).images(pipeline.unet, PROMPTS, [0])
    assert len(stage.pictures) == 3


def test_a_masked_image_is_the_pruned_networks(pipeline):
    sampler, unet = Sampler(pipeline, steps=2, guidance_scale=3.0), pipeline.unet
    mask_BN = torch.ones(2, len(unet.kept_blocks), dtype=torch.bool)
    mask_BN[1, unet.blocks.index(MID)] = False
    whole, masked = sampler.images(unet, ["x"], [0, 0], mask_BN)
    assert torch.equal(masked, sampler.images(unet.with_architecture({MID: 0}), ["x"], [0, 0])[0])
    assert torch.equal(whole, sampler.images(unet, ["x"], [0, 0])[0])


def test_an_export_is_a_stock_second_stage(pipeline, tmp_path):
    middle = dict.fromkeys(("mid_block.resnets.0", MID, "mid_block.resnets.1"), 0)
    student = with_unet(pipeline, pipeline.unet.with_architecture(middle))
    assert export_pipeline(student, tmp_path / "export").is_stock
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export")
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is IFSuperResolutionPipeline and type(stock.unet) is UNet2DConditionModel
    assert torch.equal(run(stock.unet), run(student.unet))
    assert stock("a cat", image=torch.zeros(1, 3, 16, 16), num_inference_steps=2).images[0].size == (32, 32)


# ---- training


def test_a_training_step_moves_every_block_and_the_noise_level(pipeline):
    unet, draw = small_unet().train(), torch.Generator().manual_seed(3)
    recorder, teacher = recorder_of(unet, "epsilon"), small_unet()
    uncond = Conditioning({"text": torch.zeros(1, 7, 16)})
    schedule = schedule_of(pipeline.scheduler)
    objective = Recovery(denoiser=recorder, schedule=schedule, uncond=uncond, teacher=teacher, caption_dropout=0.5)
    objective = OfPictures(VarianceKept(objective, recorder, teacher), pipeline)
    batch = {"latents": torch.rand(4, 3, 32, 32, generator=draw) * 2 - 1, "progress": 0.5}
    batch["text"] = torch.randn(4, 7, 16, generator=draw)
    with torch.no_grad():
        unet.conv_out.weight += 0.1
    loss, metrics = objective.loss({STUDENT: unet}, batch, torch.Generator().manual_seed(0), STUDENT)
    loss.backward()
    assert loss.isfinite() and metrics["variance"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())
    assert unet.class_embedding.linear_1.weight.grad.any() and unet.conv_in.weight.grad[:, 3:].any()
