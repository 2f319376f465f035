"""Packages draw what their pipeline draws, without diffusers, and say no to machines that they were not made for."""

import copy
import json
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    UNet2DModel,
)
from PIL import Image
from torch import nn

from scripts import random_transformers
from slimstep.eval.config import PackageConfig
from slimstep.eval.package_job import resized, unit_noises
from slimstep.eval.packaging import run_package
from slimstep.eval.packaging.coefficients import sampler_coefficients
from slimstep.eval.packaging.formats import check_graphs, write_package
from slimstep.eval.packaging.mobile import check_interfaces, check_operations
from slimstep.eval.packaging.package import package_of
from slimstep.eval.packaging.sizes import sizes_from
from slimstep.eval.packaging.tokenization import tokenizations_of
from slimstep.eval.packaging.weights import write_weights
from slimstep.eval.sampling import Sampler, next_latents
from slimstep.models.card import Origin
from slimstep.models.family import family_of
from slimstep.models.flow import set_steps
from slimstep.models.guidance import with_guidance_embedding
from slimstep.models.networks import network_of, with_unet
from slimstep.models.pipeline import export_pipeline, load_pipeline
from slimstep.models.schedulers import SHORT, reads_variance
from slimstep.models.sizes import drawing, scale_factor
from tests.jobs import run_job
from tests.packaged import PROMPT, drawn_alone, drawn_here, noises, packaged
from tests.tiny import slow, tiny_sdxl_pipeline


def pruned(unet):
    """Of two levels, with a removed block, a copied one and narrower ones."""
    removed = next(block for block in unet.kept_blocks if "attentions" in block)
    narrower = {"up_blocks.0.resnets.0": {"channels": 0.5}, "mid_block.attentions.0": {"attn1": 0, "ff": 0.25}}
    table = {block: {"widths": widths} for block, widths in narrower.items()}
    return unet.with_architecture({unet.copyable_blocks[0]: 2, removed: 0, **table})


def check_sizes(sampler: Sampler, folder: Path, *sizes: tuple[int, int]) -> None:
    """A package draws these sizes as the pipeline does."""
    manifest = json.loads((folder / "package.json").read_text())
    for height, width in sizes:
        with drawing(sampler.pipeline, height, width):
            other = resized(sampler)
            noise, expected = noises(other, 2, manifest), drawn_here(other, 2)
        assert expected.shape[-2:] == (height, width)
        np.testing.assert_allclose(drawn_alone(folder, noise, "--size", f"{height}x{width}"), expected, atol=1e-4)


# ---- samplers ----


def cases() -> list:
    fast = ("ddim", "euler", "lcm", "dpmsolver++")
    return [name for name in SHORT if name in fast] + slow(*(name for name in SHORT if name not in fast))


@pytest.mark.parametrize("name", cases())
def test_weighted_sums_are_what_a_scheduler_does(name, tiny_pipeline_folder):
    pipeline = load_pipeline(tiny_pipeline_folder, scheduler=name)
    for steps in (1, 2, 5):
        sampler = Sampler(pipeline, steps, 1.0, seed=3)
        coefficients = sampler_coefficients(sampler.scheduler, steps)
        cond = sampler.encode([PROMPT])
        noise = [*torch.from_numpy(unit_noises(sampler, 0, len(coefficients.latents.noises)))[:, None]]
        predictions: list[torch.Tensor] = []
        for t, weights in zip(coefficients.timesteps, coefficients.inputs, strict=True):
            x = weights.of(noise[: len(weights.noises)], predictions)
            predictions.append(sampler.predict(sampler.network, x, torch.tensor([t]), cond))
        expected = sampler.latents_at(sampler.network, cond, [0])
        torch.testing.assert_close(coefficients.latents.of(noise, predictions), expected, rtol=1e-3, atol=1e-3)


class Bent(DDIMScheduler):
    def step(self, model_output, *given, **options):
        return super().step(model_output.tanh(), *given, **options)


def test_a_scheduler_whose_steps_are_no_weighted_sums_is_refused():
    with pytest.raises(ValueError, match="Bent are no weighted sums of its inputs, with clip_sample: set another"):
        sampler_coefficients(Bent(clip_sample=True), 4)


CLIPPING = {
    "clipped DDIM": DDIMScheduler(),
    "thresholded DDIM": DDIMScheduler(thresholding=True, sample_max_value=1.5),
    "clipped DDPM": DDPMScheduler(clip_sample_range=0.8),
    "DeepFloyd's DDPM": DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, sample_max_value=1.5, variance_type="learned_range"
    ),
    "thresholded DPM-Solver": DPMSolverMultistepScheduler(thresholding=True, sample_max_value=1.5),
    "clipped LCM": LCMScheduler(clip_sample=True),
}


@pytest.mark.parametrize("kind", CLIPPING)
def test_clipped_samples_and_predicted_variances_are_followed(kind):
    """By the terms of a package's program, for any network, here one that bends its input."""
    scheduler, generators = CLIPPING[kind], [torch.Generator().manual_seed(2)]
    coefficients = json.loads(json.dumps(asdict(sampler_coefficients(scheduler, 5))))
    assert coefficients["clip"] and bool(coefficients["deviations"]) == reads_variance(scheduler)
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    added = [torch.randn(noise.shape, generator=generators[0]) for _ in coefficients["latents"]["noises"][1:]]
    terms = run_package.Terms(torch.stack([noise, *added], dim=1).numpy(), coefficients)

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        return 3 * torch.cat([(x + t / 1000).sin(), x.cos() / 3], dim=1)

    walked, generators, z = copy.deepcopy(scheduler), [torch.Generator().manual_seed(2)], noise
    set_steps(walked, 5, None)
    for weights, t in zip(coefficients["inputs"], walked.timesteps, strict=True):
        np.testing.assert_allclose(terms.sum(weights), z, atol=1e-4)
        prediction = network(z, float(t))
        terms.add(prediction[:, :3].numpy(), prediction[:, 3:].numpy())
        z = next_latents(walked, prediction if reads_variance(walked) else prediction[:, :3], t, z, generators)
    np.testing.assert_allclose(terms.sum(coefficients["latents"]), z, atol=1e-4)


def test_captions_are_watched_and_the_tokenizers_are_put_back(tiny_pipeline_folder):
    pipeline = load_pipeline(tiny_pipeline_folder)
    tokenizer = pipeline.tokenizer
    (tokenization,) = tokenizations_of(pipeline)
    assert (tokenization.part, tokenization.length) == ("tokenizer", tokenizer.model_max_length)
    assert (tokenization.before, tokenization.after, tokenization.masked) == ("", "", False)
    assert not (tokenization.lowers or tokenization.strips or tokenization.joins_spaces)
    assert pipeline.tokenizer is tokenizer


# ---- packages ----


def test_a_job_packages_an_export(tiny_pipeline_folder, tmp_path):
    pytest.importorskip("onnxscript")
    words = [f"model.name_or_path={tiny_pipeline_folder}", f"root={tmp_path}", "name=made", "eval.steps=2"]
    options = "package.formats=[onnx]", "package.batch=2", "package.sizes=[12-24x16]", "package.weights=beside"
    done = run_job("+experiment=package", *words, *options)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "made/onnx"
    manifest = json.loads((folder / "package.json").read_text())
    assert manifest["format"] == "onnx" and manifest["guides"] and list(manifest["samplers"]) == ["2"]
    sampler = Sampler(load_pipeline(tiny_pipeline_folder), 2, manifest["guidance_scale"], seed=1)
    found = drawn_alone(folder, noises(sampler, 3, manifest), without=("torch",))
    np.testing.assert_allclose(found, drawn_here(sampler, 3), atol=1e-4)
    assert (tmp_path / "made/images/onnx-0.png").is_file() and "pixels differ by" in done.stdout
    weight = sampler.network.conv_in.weight.detach().numpy().tobytes()
    files = {file.name: file.read_bytes().count(weight) for file in (folder / "unet").glob("model.onnx*")}
    assert files == {"model.onnx": 0, "model.onnx.data": 1}
    # The smallest and the largest were drawn by the job; this is another, and its neighbours are none.
    assert Image.open(tmp_path / "made/images/onnx-24x16.png").size == (16, 24)
    check_sizes(sampler, folder, (20, 16))
    for size in ("28x16", "18x16", "16x20", "16"):
        with pytest.raises(SystemExit, match=f"{size}: the package draws .* of 16x16, 12-24x16, in multiples of 4"):
            run_package.latent_shape(size, manifest)


@pytest.mark.parametrize("text", ["512", "512x", "0x512", "512x1024-768", "512 x 768", "512x768x3"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=f"package.sizes={text} must be HEIGHTxWIDTH in pixels"):
        PackageConfig(sizes=["512x768", text])


def test_sizes_between_the_networks_steps_are_refused(tiny_pipeline_folder):
    sampler = Sampler(load_pipeline(tiny_pipeline_folder), 1, 1.0)
    with pytest.raises(ValueError, match="package.sizes=18x16-30: .* multiples of 4 px; nearest: 16x16-32"):
        package_of(sampler, [1], 1, [sizes_from("18x16-30")])


def test_steps_that_a_student_never_learnt_are_refused(tiny_pipeline_folder, tmp_path):
    origin = Origin("a", 1, 1.0, trained_steps=1)
    export_pipeline(load_pipeline(tiny_pipeline_folder), tmp_path / "export", origin=origin)
    words = [f"model.name_or_path={tmp_path / 'export'}", f"root={tmp_path}", "package.steps=[4]", "plan=true"]
    done = run_job("+experiment=package", *words)
    assert done.returncode == 1 and "package.steps=4: 4 steps are not among the timesteps" in done.stderr
    assert "leave it out" in done.stderr and "eval.steps" not in done.stderr


def test_a_graph_that_is_not_its_network_is_found(tiny_pipeline_folder, tmp_path):
    pytest.importorskip("onnxscript")
    sampler = Sampler(load_pipeline(tiny_pipeline_folder), 1, 1.0)
    package = package_of(sampler, [1], 1)
    write_package(package, "onnx", tmp_path)
    nn.init.ones_(package.graphs["denoise"].module.network.conv_out.bias)
    with pytest.raises(ValueError, match="onnx's denoise is not the network: it differs by"):
        check_graphs(package, tmp_path)


@pytest.mark.slow
def test_a_compiled_package_draws_the_same_and_shares_its_weights(tiny_pipeline_folder, tmp_path):
    pipeline, options = load_pipeline(tiny_pipeline_folder), {"batch": 2, "sizes": ["8-24x16-32"]}
    sampler = packaged(pipeline, tmp_path, 2, 2.5, "aoti", **options, weights="beside")
    folder = tmp_path / "package"
    check_sizes(sampler, folder, (8, 32), (20, 16))
    manifest = json.loads((folder / "package.json").read_text())
    found = drawn_alone(folder, noises(sampler, 3, manifest), without=("onnxruntime",))
    np.testing.assert_allclose(found, drawn_here(sampler, 3), atol=1e-4)

    weight = sampler.codec.decoder.conv_in.weight.detach().numpy().tobytes()
    shared, copies = folder / "weights.safetensors", {}
    for place in ("beside", "inside", str(shared)):  # of the decoder alone, which is compiled soonest
        whole, alone = package_of(sampler, [2], 1, weights=place), tmp_path / Path(place).name
        alone.mkdir()
        write_package(replace(whole, graphs={"decode": whole.graphs["decode"]}), "aoti", alone)
        copies[place] = {file.name: contents(file).count(weight) for file in alone.iterdir()}
    assert shared.read_bytes().count(weight) == 1 and not contents(folder / "model.pt2").count(weight)
    assert copies["beside"]["model.pt2"] == copies[str(shared)]["model.pt2"] == 0
    assert copies["beside"]["weights.safetensors"] == copies["inside"]["model.pt2"] == 1
    assert "weights.safetensors" not in copies[str(shared)] and "weights.safetensors" not in copies["inside"]


def contents(file: Path) -> bytes:
    """A file's bytes, of an archive what is in it."""
    if not zipfile.is_zipfile(file):
        return file.read_bytes() if file.is_file() else b""
    with zipfile.ZipFile(file) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


def test_a_weight_is_written_once_for_all_graphs_and_packages(tmp_path):
    one, two, three = torch.randn(3, 4), torch.ones(2, dtype=torch.bfloat16), torch.arange(5)
    first, second, alien = (tmp_path / name for name in ("first", "second", "alien"))
    for folder in (first, second, alien):
        folder.mkdir()
    here = {"device": "cpu"}
    made = write_weights({"encode": {"a": one, "tied": one.clone()}, "denoise": {"b": one, "c": two}}, first, None)
    assert made["weights"] == ["weights.safetensors"]
    keys = made["constants"]["denoise"]
    assert made["constants"]["encode"] == {"a": keys["b"], "tied": keys["b"]}
    assert len(run_package.weights_beside(first, {**made, **here})) == 2

    more = write_weights({"denoise": {"b": one, "size": three}}, second, first / "weights.safetensors")
    assert more["weights"] == ["../first/weights.safetensors", "weights.safetensors"]
    found = run_package.weights_beside(second, {**more, **here})
    assert torch.equal(found[more["constants"]["denoise"]["b"]], one)
    assert torch.equal(found[more["constants"]["denoise"]["size"]], three) and len(found) == 2
    with pytest.raises(ValueError, match="has no weight of this model"):
        write_weights({"denoise": {"b": one.double()}}, alien, first / "weights.safetensors")
    with pytest.raises(ValueError, match="strides .* package.weights=inside"):
        write_weights({"denoise": {"b": one.T}}, alien, None)
    (first / "weights.safetensors").unlink()
    with pytest.raises(SystemExit, match="first/weights.safetensors is not there: the weights of .*second"):
        run_package.weights_beside(second, {**more, **here})


def test_weights_of_another_package_are_for_compiled_ones():
    with pytest.raises(ValueError, match=r"package.weights=a.safetensors is for package.formats=\[aoti\]"):
        PackageConfig(weights="a.safetensors")
    with pytest.raises(ValueError, match="package.weights=outside must be inside, beside, or"):
        PackageConfig(weights="outside")
    with pytest.raises(ValueError, match="package.sizes: coreml and executorch packages have one size"):
        PackageConfig(formats=["onnx", "executorch", "coreml"], sizes=["8x8"])
    assert PackageConfig(formats=["aoti"], weights="a.safetensors").batch == 1


def test_a_compiled_package_refuses_other_machines():
    here = {"torch": "2.14.1", "machine": run_package.platform.machine(), "processor": run_package.processor_features()}
    assert not run_package.other_machine(here, "2.14.1")
    assert run_package.other_machine(here, "2.11.0") == "made with torch 2.14.1, and this is torch 2.11.0"
    assert "made for vax processors" in run_package.other_machine(here | {"machine": "vax"}, "2.14.1")
    assert "a processor with avx9" in run_package.other_machine(here | {"processor": ["avx9"]}, "2.14.1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guidance"), [("sd3", 2.5), ("flux", 1.0), ("pixart", 2.5), ("sana", 2.5), ("qwen_image", 1.0)]
)
def test_transformers_are_packaged_or_refused_by_name(name, guidance, tmp_path):
    pytest.importorskip("onnxscript")
    pipeline = getattr(random_transformers, f"small_{name}_pipeline")()
    if name == "qwen_image":
        with pytest.raises(ValueError, match="tokenizer is asked for as many ids as a caption has"):
            packaged(pipeline, tmp_path, 3, guidance)
        return
    check_onnx(pipeline, tmp_path, 3, guidance)


def check_onnx(pipeline, folder: Path, steps: int, guidance: float) -> Sampler:
    """Of the pipeline's own size, and of half its height by twice its width."""
    step = family_of(pipeline).shrinks(network_of(pipeline)) * scale_factor(pipeline)
    sampler = packaged(pipeline, folder, steps, guidance, batch=2, sizes=[f"{step}x{step}-{6 * step}"])
    manifest = json.loads((folder / "package/package.json").read_text())
    found = drawn_alone(folder / "package", noises(sampler, 2, manifest), without=("torch",))
    np.testing.assert_allclose(found, drawn_here(sampler, 2), atol=1e-4)
    check_sizes(sampler, folder / "package", (step, 3 * step))
    return sampler


@pytest.mark.slow
def test_sdxl_is_packaged_and_told_the_size(tmp_path):
    pytest.importorskip("onnxscript")
    pipeline = check_onnx(tiny_sdxl_pipeline(), tmp_path, 2, 2.5).pipeline
    noise = np.random.default_rng(0).standard_normal((1, 1, 4, 4, 16), np.float32)
    found = drawn_alone(tmp_path / "package", noise, "--size", "8x32")
    options = {"num_inference_steps": 2, "guidance_scale": 2.5, "latents": torch.from_numpy(noise[:, 0]), "height": 8,
               "width": 32, "output_type": "pt"}  # fmt: skip
    expected = pipeline(PROMPT, **options).images.numpy() * 2 - 1
    np.testing.assert_allclose(found.clip(-1, 1), expected, atol=1e-4)


@pytest.mark.slow
def test_a_model_of_pixels_is_packaged(tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=2, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    sampler = packaged(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()), tmp_path, 3, 1.0)
    manifest = json.loads((tmp_path / "package/package.json").read_text())
    found = drawn_alone(tmp_path / "package", noises(sampler, 2, manifest))
    cond = sampler.encode(["image 0"]).rows([0])
    expected = torch.cat([sampler.latents_at(sampler.network, cond, [i]) for i in (0, 1)])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["guidance_embedding", "pruned", "int8"])
def test_students_are_packaged(kind, tiny_pipeline_folder, tmp_path):
    """A student that takes its guidance scale, one with removed, copied and narrower blocks, and one with a block in
    int8 and another that merges tokens."""
    pytest.importorskip("onnxscript")
    pipeline = load_pipeline(tiny_pipeline_folder)
    unet = pipeline.unet
    if kind == "guidance_embedding":
        student = copy.deepcopy(with_guidance_embedding(unet, 8))
        nn.init.normal_(student.time_embedding.cond_proj.weight)
    elif kind == "int8":
        first, second = unet.mergeable_blocks[:2]
        student = unet.with_architecture({first: {"dtype": "int8"}, second: {"merge": 0.5}})
    else:
        student = pruned(unet)
    folder = tmp_path / "export"
    export_pipeline(with_unet(pipeline, student), folder)
    sampler = Sampler(load_pipeline(folder), 2, 2.5, seed=1)
    package = tmp_path / "package"
    package.mkdir()
    write_package(package_of(sampler, [2], 1), "onnx", package)
    manifest = json.loads((package / "package.json").read_text())
    assert manifest["takes_guidance"] == (kind == "guidance_embedding") != manifest["guides"]
    found = drawn_alone(package, noises(sampler, 2, manifest))
    # A number on the edge between two integers may fall to either.
    np.testing.assert_allclose(found, drawn_here(sampler, 2), atol=0.02 if kind == "int8" else 1e-4)
    if kind == "guidance_embedding":
        other = drawn_alone(package, noises(sampler, 2, manifest), "--guidance", "6")
        assert np.abs(other - found).max() > 1e-3


# ---- phones ----


@pytest.mark.slow
def test_a_pruned_student_is_packaged_for_executorch(tiny_pipeline_folder, tmp_path):
    pytest.importorskip("executorch")
    pipeline = load_pipeline(tiny_pipeline_folder)
    sampler = packaged(with_unet(pipeline, pruned(pipeline.unet)), tmp_path, 2, 2.5, "executorch")
    manifest = json.loads((tmp_path / "package/package.json").read_text())
    assert manifest["graphs"] == dict.fromkeys(["denoise", "decode", "encode"], "model.pte")
    found = drawn_alone(tmp_path / "package", noises(sampler, 2, manifest), without=("onnxruntime",))
    np.testing.assert_allclose(found, drawn_here(sampler, 2), atol=1e-4)


@pytest.mark.slow
def test_a_pruned_student_is_packaged_for_core_ml(tiny_pipeline_folder, tmp_path):
    """Converted, and read again with the inputs and outputs of its graphs; run on a Mac alone."""
    pytest.importorskip("coremltools")
    pipeline = load_pipeline(tiny_pipeline_folder)
    sampler = packaged(with_unet(pipeline, pruned(pipeline.unet)), tmp_path, 2, 2.5, "coreml")
    package = package_of(sampler, [2], 1)
    check_interfaces(package, tmp_path / "package")
    package.graphs["decode"].inputs["latent_sample"] = torch.randn(1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"coreml's decode takes and gives .*latent_sample', \[1, 4, 8, 8\]"):
        check_interfaces(package, tmp_path / "package")
    if not run_package.runs_here("coreml"):
        with pytest.raises(SystemExit, match="Core ML runs on macOS alone"):
            run_package.Package(tmp_path / "package", json.loads((tmp_path / "package/package.json").read_text()))
        return
    manifest = json.loads((tmp_path / "package/package.json").read_text())
    found = drawn_alone(tmp_path / "package", noises(sampler, 2, manifest))
    np.testing.assert_allclose(found, drawn_here(sampler, 2), atol=1e-3)


def test_what_no_phone_converter_takes_is_refused_by_its_blocks(tiny_pipeline_folder):
    pipeline = load_pipeline(tiny_pipeline_folder)
    first, second = pipeline.unet.mergeable_blocks[:2]
    student = with_unet(pipeline, pipeline.unet.with_architecture({first: {"merge": 0.5}, second: {"dtype": "int8"}}))
    program = package_of(Sampler(student, 1, 1.0), [1], 1).graphs["denoise"].exported()
    with pytest.raises(ValueError, match=rf"coreml has no operation for {first}.*\(merge\), {second}.*\(dtype: int8\)"):
        check_operations({"denoise": program}, "coreml")


def test_formats_for_phones_name_what_they_lack(leave, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    code, error = leave("+experiment=package", *tiny_model, "package.formats=[executorch]")
    assert code == 1 and "package.formats=executorch needs executorch: pip install -e '.[executorch]'" in error
    code, error = leave("+experiment=package", *tiny_model, "package.formats=[coreml]", "package.batch=2")
    assert code == 1 and "package.batch=2: coreml packages draw one image at a time: package.batch=1" in error
