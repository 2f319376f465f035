"""The networks of a pipeline as functions of tensors: encode (ids and pictures to what is conditioned on), denoise,
decode (latents to pixels).

Axes: R rows of the network (two for a guided image), B images, C channels, H and W height and width, L tokens. What is
written CHW of images is CFHW of videos, with F frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from slimstep.engine.quiet import one_line
from slimstep.eval.packaging.pictures import Picture
from slimstep.eval.packaging.tokenization import Tokenization, tokenizer_stubs
from slimstep.eval.sampling import Sampler
from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import decoded_images
from slimstep.models.denoiser import Denoiser, takes_guidance
from slimstep.models.family import conditions_of_captions
from slimstep.models.first_frames import video_options
from slimstep.models.networks import text_encoders

# What diffusers and optimum call the inputs of a UNet; others keep the names of conditioning.py.
INPUT_NAMES = {"text": "encoder_hidden_states", "pooled": "text_embeds"}


@dataclass(frozen=True)
class Graph:
    """A module that is called with tensors alone, `forward(*inputs)`. inputs: examples by name. outputs: their names.
    rows: any number up to this may be given at once, 0 where it is fixed; `timestep` is one for all rows. spans:
    heights and widths that the first input may have, where these are latents."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    rows: int = 0
    spans: tuple[range, ...] = ()

    @torch.no_grad()
    def exported(self) -> torch.export.ExportedProgram:
        """ValueError where the network cannot be written as one graph."""
        rows = {0: torch.export.Dim("rows", min=1, max=self.rows)} if self.rows else {}
        free = [{} if name == "timestep" else dict(rows) for name in self.inputs]
        free[0] |= {axis: dimension(axis, span) for axis, span in enumerate(self.spans, 2) if len(span) > 1}
        inputs = tuple(self.at(*self.other_sides()).values()) if self.spans else tuple(self.inputs.values())
        try:
            return torch.export.export(self.module, inputs, dynamic_shapes=(tuple(free),), strict=False)
        except Exception as error:  # torch's have no common kind
            raise ValueError(f"{type(self.module).__name__.lower()} is no single graph: {one_line(error)}") from error

    def other_sides(self) -> list[int]:
        """An example that a graph does not take for all sizes: no single step, behind which dimensions of 1 are, no
        square, and, as far as there are others, not the network's own, of which it may have tables."""
        own, (heights, widths) = next(iter(self.inputs.values())).shape[2:], self.spans
        height = min(reversed(heights), key=lambda n: (n == heights.step, n == own[0]))
        return [height, min(reversed(widths), key=lambda n: (n == widths.step, n == height, n == own[1]))]

    def at(self, height: int, width: int) -> dict[str, Tensor]:
        """Examples of inputs whose latents have this size."""
        (name, x), *others = self.inputs.items()
        return {name: torch.randn(*x.shape[:2], height, width).to(x), **dict(others)}


def dimension(axis: int, span: range) -> Any:
    """What torch.export calls a side that may be any number of `span`."""
    step = span.step
    free = torch.export.Dim({2: "height", 3: "width"}[axis], min=span[0] // step, max=span[-1] // step)
    return step * free if step > 1 else free


class Encode(nn.Module):
    """One caption's ids, and masks, for each tokenizer, and one picture [1, 3, H, W] from −1 to 1 with its noise, as
    far as a pipeline takes them → its conditioning, in float32, in the order of `names`."""

    def __init__(
        self, pipeline: DiffusionPipeline, tokenizations: Sequence[Tokenization], picture: Picture | None,
        names: Sequence[str],
    ):  # fmt: skip
        super().__init__()
        self.encoders = nn.ModuleDict(text_encoders(pipeline) if tokenizations else {})
        self.of_picture = nn.ModuleDict(picture.modules if picture else {})
        self.pipeline, self.tokenizations, self.picture, self.names = pipeline, tokenizations, picture, names

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        left, tensors = list(given), dict[str, Tensor]()
        if self.tokenizations:
            with tokenizer_stubs(self.pipeline) as placed:
                for tokenization in self.tokenizations:
                    stub = next(one for one in placed if one.part == tokenization.part)
                    stub.given = tuple(left.pop(0) for _ in tokenization.inputs)
                tensors |= conditions_of_captions(self.pipeline, [""]).tensors
        if self.picture:
            tensors |= self.picture.conditions(*left)
        return tuple(tensors[name].float() for name in self.names)


class Denoise(nn.Module):
    """x_t [R, C, H, W], one timestep [1], the conditioning's tensors and, of networks that take it, the guidance scale
    [R] → the prediction [R, C, H, W]."""

    def __init__(self, network: nn.Module, denoiser: Denoiser, names: Sequence[str]):
        super().__init__()
        self.network, self.denoiser, self.names, self.takes_guidance = network, denoiser, names, takes_guidance(network)

    def forward(self, *inputs: Tensor) -> Tensor:
        x_t, t_1, *given = inputs
        cond = Conditioning(dict(zip(self.names, given, strict=False)))
        guidance_B = given[-1] if self.takes_guidance else None
        return self.denoiser(self.network, x_t, t_1.expand(x_t.shape[0]), cond, guidance_B=guidance_B)


class Decode(nn.Module):
    """What is not scaled any more [B, C, H, W] → images [B, 3, H, W] from −1 to 1; frames_at_once: decoded_images'."""

    def __init__(self, vae: ModelMixin, frames_at_once: int | None = None):
        super().__init__()
        self.vae, self.frames_at_once = vae, frames_at_once

    def forward(self, *inputs: Tensor) -> Tensor:
        dtype = next(self.vae.parameters()).dtype
        return decoded_images(self.vae, inputs[0].to(dtype), self.frames_at_once).float()


def graphs_of(
    sampler: Sampler, tokenizations: Sequence[Tokenization], picture: Picture | None, cond: Conditioning, batch: int,
    spans: tuple[range, ...] = (),
) -> dict[str, Graph]:  # fmt: skip
    """{encode, denoise, decode}, as far as the pipeline has them. cond: of one caption and picture. batch: most images
    at once. spans: heights and widths in latents, where there is more than the pipeline's own."""
    pipeline, network, denoiser = sampler.pipeline, sampler.network, sampler.stepping_denoiser
    rows, names = batch * (2 if sampler.guides(network) else 1), tuple(cond.tensors)
    x_t, cond_R = torch.randn(rows, *denoiser.sample_shape), cond.expand(rows)
    inputs = {"sample": x_t, "timestep": torch.tensor([500.0])}
    inputs |= {INPUT_NAMES.get(name, name): tensor.float() for name, tensor in cond_R.tensors.items()}
    if takes_guidance(network):
        inputs["guidance"] = torch.full((rows,), 2.0)
    device = next(network.parameters()).device

    def graph(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], *free: Any) -> Graph:
        return Graph(module, {name: x.contiguous().to(device) for name, x in inputs.items()}, outputs, *free)

    free = (rows if batch > 1 else 0), spans
    graphs = {"denoise": graph(Denoise(network, denoiser, names), inputs, ["out_sample"], *free)}
    if sampler.codec is not None:
        decode = Decode(sampler.codec, video_options(pipeline).decode_chunk_size)
        latents = {"latent_sample": sampler.of_video(x_t[:batch]).clone()}
        graphs["decode"] = graph(decode, latents, ["sample"], batch if batch > 1 else 0, spans)
    if names:
        given = {name: torch.ones(1, kind.length, dtype=torch.int64) for kind in tokenizations for name in kind.inputs}
        if picture:
            given |= {"picture": torch.zeros(1, 3, *picture.sides), "picture_noise": torch.randn(1, *picture.noise)}
        outputs = ["last_hidden_state", *names[1:]] if names[0] == "text" else names
        graphs["encode"] = graph(Encode(pipeline, tokenizations, picture, names), given, outputs)
    return graphs
