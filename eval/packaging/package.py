"""What a package of a pipeline is made of: its networks as graphs, its sampler and its tokenizers as numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer

from slimstep import __version__
from slimstep.eval.packaging.captions import Captions, captions_of
from slimstep.eval.packaging.coefficients import sampler_coefficients
from slimstep.eval.packaging.graphs import Graph, graphs_of
from slimstep.eval.sampling import Sampler
from slimstep.models.decoding import has_statistics, scaling_of, statistics
from slimstep.models.denoiser import takes_guidance


@dataclass(frozen=True)
class Package:
    """What a package is made of. facts: package.json, but for what a format adds."""

    sampler: Sampler
    captions: tuple[Captions, ...]
    graphs: Mapping[str, Graph]
    facts: Mapping[str, Any]

    @property
    def pipeline(self) -> DiffusionPipeline:
        return self.sampler.pipeline


def package_of(sampler: Sampler, steps: Sequence[int], batch: int) -> Package:
    """The package of a sampler's pipeline, at its guidance scale, for these numbers of sampling steps, the first by
    default. ValueError where the pipeline cannot be written as graphs and weighted sums."""
    pipeline, network = sampler.pipeline, sampler.network
    guides = sampler.guides(network)
    if guides and not is_plain_guidance(sampler):
        kind = type(pipeline).__name__
        raise ValueError(f"a {kind} rescales what is guided, which no package does: package.guidance_scale=1")
    captions = captions_of(pipeline) if sampler.family.IS_CONDITIONAL else ()
    for one in captions:
        check_tokenizer(pipeline, one)
    cond = sampler.encode_batch(["a caption"], 0)
    graphs = graphs_of(pipeline, captions, cond, guides, batch)
    samplers = {str(n): asdict(sampler_coefficients(sampler.scheduler, n, sampler.flow)) for n in steps}
    facts = {
        "slimstep": __version__, "steps": steps[0], "guidance_scale": sampler.guidance_scale, "guides": guides,
        "takes_guidance": takes_guidance(network), "batch": batch, "latents": list(sampler.latent_shape),
        "conditioning": conditioning_names(graphs, cond), "decode": unscaling(sampler),
        "tokenizers": [tokenizer_facts(pipeline, one) for one in captions], "samplers": samplers,
    }  # fmt: skip
    return Package(sampler, captions, graphs, facts)


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


def tokenizer_facts(pipeline: DiffusionPipeline, captions: Captions) -> dict[str, Any]:
    tokenizer = getattr(pipeline, captions.part)
    padding = {"pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token, "direction": tokenizer.padding_side}
    said = {"length": captions.length, "before": captions.before, "after": captions.after}
    return {"file": f"{captions.part}/tokenizer.json", "inputs": captions.inputs, "padding": padding, **said}


def check_tokenizer(pipeline: DiffusionPipeline, captions: Captions) -> None:
    """ValueError where the tokenizer alone would make other ids of a text than the pipeline's object does."""
    whole = getattr(pipeline, captions.part)
    if not hasattr(whole, "backend_tokenizer"):
        raise ValueError(f"the {captions.part} is a {type(whole).__name__}, which has no tokenizer.json")
    alone = Tokenizer.from_str(whole.backend_tokenizer.to_str())
    facts = tokenizer_facts(pipeline, captions)
    alone.enable_truncation(captions.length)
    alone.enable_padding(length=captions.length, **facts["padding"])
    for text in ("", "a red circle", "a red circle beside a blue square " * 80):
        options = {"padding": "max_length", "max_length": captions.length, "truncation": True}
        if alone.encode(text).ids != list(whole(text, **options).input_ids):
            raise ValueError(f"{captions.part}.json alone makes other ids of {text[:40]!r} than transformers does")
