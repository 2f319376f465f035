"""What a package of a pipeline is made of: its networks as graphs, its sampler and its tokenizers as numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer

from slimstep import __version__
from slimstep.eval.packaging.coefficients import sampler_coefficients
from slimstep.eval.packaging.graphs import Graph, graphs_of
from slimstep.eval.packaging.tokenization import Tokenization, tokenizations_of
from slimstep.eval.sampling import Sampler
from slimstep.models.decoding import has_statistics, scaling_of, statistics
from slimstep.models.denoiser import takes_guidance


@dataclass(frozen=True)
class Package:
    """What a package is made of. manifest: package.json, but for what a format adds."""

    sampler: Sampler
    tokenizations: tuple[Tokenization, ...]
    graphs: Mapping[str, Graph]
    manifest: Mapping[str, Any]

    @property
    def pipeline(self) -> DiffusionPipeline:
        return self.sampler.pipeline


def package_of(sampler: Sampler, steps: Sequence[int], batch: int) -> Package:
    """The package of a sampler's pipeline, at its guidance scale, for these numbers of sampling steps, the first by
    default. ValueError where the pipeline cannot be written as graphs and weighted sums."""
    pipeline, network = sampler.pipeline, sampler.network
    guides = sampler.guides(network)
    if sampler.family.DRAWS_VIDEOS:
        raise ValueError(f"a {type(pipeline).__name__} draws videos, which no package does yet")
    if guides and not is_plain_guidance(sampler):
        kind = type(pipeline).__name__
        raise ValueError(f"a {kind} rescales what is guided, which no package does: package.guidance_scale=1")
    tokenizations = tokenizations_of(pipeline) if sampler.family.IS_CONDITIONAL else ()
    for tokenization in tokenizations:
        check_tokenizer(pipeline, tokenization)
    cond = sampler.encode_batch(["a caption"], 0)
    graphs = graphs_of(pipeline, tokenizations, cond, guides, batch)
    samplers = {str(n): asdict(sampler_coefficients(sampler.scheduler, n, sampler.flow)) for n in steps}
    manifest = {
        "slimstep": __version__, "steps": steps[0], "guidance_scale": sampler.guidance_scale, "guides": guides,
        "takes_guidance": takes_guidance(network), "batch": batch, "latents": list(sampler.latent_shape),
        "conditioning": conditioning_names(graphs, cond), "decode": unscaling(sampler),
        "tokenizers": [tokenizer_entry(pipeline, tokenization) for tokenization in tokenizations], "samplers": samplers,
    }  # fmt: skip
    return Package(sampler, tokenizations, graphs, manifest)


def is_plain_guidance(sampler: Sampler) -> bool:
    led, plain = torch.full((1, *sampler.latent_shape), 2.0), torch.ones(1, *sampler.latent_shape)
    return torch.equal(sampler.denoiser.rescaled(led, plain), led)


def conditioning_names(graphs: Mapping[str, Graph], cond: Any) -> list[str]:
    """What the denoiser's graph calls the encoder's outputs, in their order."""
    return [*graphs["denoise"].inputs][2 : 2 + len(cond.tensors)]


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
    said = {"length": tokenization.length, "before": tokenization.before, "after": tokenization.after}
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
