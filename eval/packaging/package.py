"""What a package of a pipeline is made of: its networks as graphs, its sampler and its tokenizers as numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer

from slimstep import __version__
from slimstep.engine.resolution import sides
from slimstep.eval.packaging.coefficients import sampler_coefficients
from slimstep.eval.packaging.graphs import INPUT_NAMES, Graph, graphs_of
from slimstep.eval.packaging.pictures import Picture, picture_of
from slimstep.eval.packaging.sizes import Sizes, check_multiples, corners, spans
from slimstep.eval.packaging.tokenization import Tokenization, tokenizations_of
from slimstep.eval.sampling import Sampler
from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import has_statistics, scaling_of, statistics
from slimstep.models.denoiser import takes_guidance
from slimstep.models.families.deepfloyd.cascade import refines
from slimstep.models.first_frames import begins_with_frame, call_options, with_first_frames
from slimstep.models.flow import FlowSteps
from slimstep.models.sizes import native_pixels, scale_factor

INSIDE, BESIDE = "inside", "beside"  # where a package has its weights
FRAMES_PER_SECOND = 8  # of a video whose pipeline takes no such number, as diffusers' examples write it
CAPTION = "a caption"
MOST_AREAS = 1000  # numbers of latents, each with coefficients of its own in package.json


@dataclass(frozen=True)
class Package:
    """What a package is made of. manifest: package.json, but for what a format adds."""

    sampler: Sampler
    tokenizations: tuple[Tokenization, ...]
    graphs: Mapping[str, Graph]
    manifest: Mapping[str, Any]
    latent_sides: Sequence[tuple[int, int]]  # at which graphs are checked
    weights: str  # INSIDE the files of graphs, BESIDE them, or in another package's file

    @property
    def pipeline(self) -> DiffusionPipeline:
        return self.sampler.pipeline


def package_of(
    sampler: Sampler, steps: Sequence[int], batch: int, sizes: Sequence[Sizes] = (), weights: str = INSIDE
) -> Package:
    """The package of a sampler's pipeline, at its guidance scale, for these numbers of sampling steps, the first by
    default, and these sizes beside the pipeline's own. ValueError where the pipeline cannot be written as graphs and
    weighted sums, or draws no such size."""
    pipeline, network = sampler.pipeline, sampler.network
    guides = sampler.guides(network)
    shares = guidance_shares(sampler) if guides else []
    tokenizations = tokenizations_of(pipeline) if sampler.family.IS_CONDITIONAL else ()
    for tokenization in tokenizations:
        check_tokenizer(pipeline, tokenization)
    picture, cond = picture_of(sampler), example_conditions(sampler)
    pixels = scale_factor(pipeline)
    every = all_sizes(sampler, sizes)
    latents = [one.shrunk(pixels) for one in every]
    step = sampler.family.shrinks(network)
    graphs = graphs_of(sampler, tokenizations, picture, cond, batch, spans(latents, step) if sizes else ())
    manifest = {
        "slimstep": __version__, "steps": steps[0], "guidance_scale": sampler.guidance_scale, "guides": guides,
        "guidance_shares": shares, "takes_guidance": takes_guidance(network), "batch": batch,
        "latents": list(sampler.latent_shape), "latents_before": latents_before_video(sampler),
        "frames_per_second": frames_per_second(sampler), "picture": picture_entry(picture),
        "conditioning": [INPUT_NAMES.get(name, name) for name in cond.tensors],
        "decode": unscaling(sampler),
        "tokenizers": [tokenizer_entry(pipeline, tokenization) for tokenization in tokenizations],
        "samplers": coefficients(sampler, steps), "sizes": [one.sides for one in every],
        "pixels_per_latent": pixels, "multiples_of": step * pixels,
    }  # fmt: skip
    if depends_on_size(sampler):
        manifest["samplers_of_areas"] = coefficients_of_areas(sampler, steps, every[1:], step)
    return Package(sampler, tokenizations, graphs, manifest, corners(latents), weights)


# ---- sizes ----


def all_sizes(sampler: Sampler, sizes: Sequence[Sizes]) -> list[Sizes]:
    """The pipeline's own size and those asked for. ValueError for one that its network does not take."""
    network: Any = sampler.network
    pixels = scale_factor(sampler.pipeline)
    height, width = (side * pixels for side in sampler.latent_shape[-2:])
    if sizes and (sampler.family.DRAWS_VIDEOS or refines(sampler.pipeline)):
        kind = type(sampler.pipeline).__name__
        way = "leave it out, and choose the size with data.resolution"
        raise ValueError(f"package.sizes={', '.join(map(str, sizes))}: a package of a {kind} has one size; {way}")
    most = network.config.get("pos_embed_max_size")  # of Stable Diffusion 3's table of positions, in tokens
    for one in sizes:
        check_multiples(one, sampler.family.shrinks(network) * pixels)
        if most and max(one.height[1], one.width[1]) > (longest := most * network.config.patch_size * pixels):
            raise ValueError(f"package.sizes={one}: the network's positions end at {longest} px (pos_embed_max_size)")
    merging = [block for block, spec in network.architecture.items() if spec.merge]
    if sizes and merging:
        reason = f"{', '.join(merging)} merge tokens, a number of one size"
        raise ValueError(f"package.sizes: {reason}; leave it out, and choose the size with data.resolution")
    return [Sizes((height, height), (width, width)), *sizes]


def depends_on_size(sampler: Sampler) -> bool:
    """Whether the scheduler shifts its times by the number of an image's tokens, as FLUX's."""
    return sampler.flow is not None and bool(sampler.scheduler.config.get("use_dynamic_shifting"))


def coefficients(sampler: Sampler, steps: Sequence[int], flow: FlowSteps | None = None) -> dict[str, Any]:
    """Those of so many sampling steps each."""
    return {str(n): asdict(sampler_coefficients(sampler.scheduler, n, flow or sampler.flow)) for n in steps}


def coefficients_of_areas(
    sampler: Sampler, steps: Sequence[int], sizes: Sequence[Sizes], step: int
) -> dict[str, dict[str, Any]]:
    """Those of every number of latents that an image of these sizes has."""
    pixels = scale_factor(sampler.pipeline)
    pairs = [(h // pixels, w // pixels) for one in sizes for h, w in one.every(step * pixels)]
    areas = {h * w: [h, w] for h, w in pairs}
    if len(areas) > MOST_AREAS:
        kind = type(sampler.scheduler).__name__
        raise ValueError(
            f"package.sizes={', '.join(map(str, sizes))}: the {kind} shifts its times by an image's area, and these "
            f"are {len(areas)} areas; name single sizes, or ranges with at most {MOST_AREAS}"
        )
    network: Any = sampler.network
    config = network.config
    flows = {area: sampler.family.flow({**config, "sample_size": sides}) for area, sides in areas.items()}
    return {str(area): coefficients(sampler, steps, flow) for area, flow in flows.items()}


def guidance_shares(sampler: Sampler) -> list[float]:
    """How much of what is guided the frames of a video take, each by itself; nothing where all take it whole.
    ValueError where what is guided is rescaled otherwise."""
    source = torch.Generator().manual_seed(0)
    led, plain = torch.randn(2, 1, *sampler.latent_shape, generator=source)
    rescaled = sampler.denoiser.rescaled(led, plain)
    if torch.equal(rescaled, led):
        return []
    if len(sampler.latent_shape) == 4:
        shares_F = sampler.denoiser.rescaled(torch.ones_like(led), torch.zeros_like(led))[0, 0, :, 0, 0]
        if torch.allclose(rescaled, plain + shares_F[:, None, None] * (led - plain), atol=1e-5):
            return shares_F.tolist()
    kind = type(sampler.pipeline).__name__
    raise ValueError(f"a {kind} rescales what is guided, which no package does: package.guidance_scale=1")


def example_conditions(sampler: Sampler) -> Conditioning:
    """Of some caption, and some picture of the pipeline's size."""
    if begins_with_frame(sampler.pipeline):
        grey = torch.full((*sides(native_pixels(sampler.pipeline)), 3), 128, dtype=torch.uint8)
        with_first_frames(sampler.pipeline, {CAPTION: grey})
    return sampler.conditions([CAPTION], [0])


def picture_entry(picture: Picture | None) -> dict[str, Any] | None:
    if picture is None:
        return None
    return {"what": picture.what, "sides": list(picture.sides), "noise": list(picture.noise)}


def latents_before_video(sampler: Sampler) -> int:
    """Those that the network makes before a video's own, which are not decoded."""
    example = torch.zeros(1, *sampler.latent_shape)
    return example.shape[2] - sampler.of_video(example).shape[2] if sampler.family.DRAWS_VIDEOS else 0


def frames_per_second(sampler: Sampler) -> float | None:
    """Of a video as a file; None of images."""
    if not sampler.family.DRAWS_VIDEOS:
        return None
    return call_options(sampler.pipeline).get("fps", FRAMES_PER_SECOND)


def unscaling(sampler: Sampler) -> dict[str, list[float]]:
    """{scale, shift}: by channel, from a pipeline's latents to what its VAE decodes."""
    if sampler.codec is None:
        return {"scale": [1.0], "shift": [0.0]}
    scaling = scaling_of(sampler.codec)
    if not has_statistics(sampler.pipeline):
        return {"scale": [1 / scaling], "shift": [0.0]}
    mean, std = statistics(sampler.codec.config)
    return {"scale": (std / scaling).flatten().tolist(), "shift": mean.flatten().tolist()}


# ---- tokenizers ----


def tokenizer_entry(pipeline: DiffusionPipeline, tokenization: Tokenization) -> dict[str, Any]:
    tokenizer = getattr(pipeline, tokenization.part)
    padding = {"pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token, "direction": tokenizer.padding_side}
    said = {name: value for name, value in asdict(tokenization).items() if name not in ("part", "masked")}
    return {"file": f"{tokenization.part}/tokenizer.json", "inputs": tokenization.inputs, "padding": padding, **said}


def check_tokenizer(pipeline: DiffusionPipeline, tokenization: Tokenization) -> None:
    """ValueError where the tokenizer alone would make other ids of a text than the pipeline's object does."""
    whole = getattr(pipeline, tokenization.part)
    if not hasattr(whole, "backend_tokenizer"):
        raise ValueError(f"the {tokenization.part} is a {type(whole).__name__}, which has no tokenizer.json")
    alone = Tokenizer.from_str(whole.backend_tokenizer.to_str())
    manifest = tokenizer_entry(pipeline, tokenization)
    alone.enable_truncation(tokenization.length)
    alone.enable_padding(length=tokenization.length, **manifest["padding"])
    for text in ("", "a red circle", "a red circle beside a blue square " * 80):
        options = {"padding": "max_length", "max_length": tokenization.length, "truncation": True}
        if alone.encode(text).ids != list(whole(text, **options).input_ids):
            raise ValueError(f"{tokenization.part}.json alone makes other ids of {text[:40]!r} than transformers does")
