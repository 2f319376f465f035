"""Sampling inside the framework: what the stock pipeline would draw, for any UNet, with block masks.

Timesteps, scheduler, guidance rule and rounding to 8 bits are those of `StableDiffusionPipeline.__call__`; what differs
is the noise, which belongs to the prompt: image i is a function of (seed, i), whatever batch or process draws it.

Axes: B batch, L text tokens, E text width, C channels, H and W height and width, N kept blocks, S steps.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimstep.data.encoding import finite, rows_at_once
from slimstep.engine.seeding import generator
from slimstep.eval.cpu_parts import can_be_parted, draw_in_parts
from slimstep.eval.timing.precision import computing, products_on
from slimstep.models.conditioning import empty_text_state, text_states
from slimstep.models.decoding import has_statistics, statistics, unscaled
from slimstep.models.guidance import guidance_embedding, told_guidance_width
from slimstep.models.schedulers import check_sampling, used_spacing

TEXTS_PER_BATCH = 64  # cut by index, so that a prompt's state does not depend on who asks for it


@dataclass(frozen=True)
class Texts:
    """What a UNet is told: one text state per prompt, and the state of the empty prompt for guidance."""

    states_BLE: Tensor
    empty_1LE: Tensor

    def __len__(self) -> int:
        return len(self.states_BLE)

    def rows(self, indices: Sequence[int]) -> "Texts":
        """The prompts `indices`, in that order; an index may come more than once."""
        return Texts(self.states_BLE[list(indices)], self.empty_1LE)

    def with_unconditional(self) -> Tensor:
        """[2B, L, E]: the empty prompt B times, then the prompts, as diffusers orders guidance batches."""
        return torch.cat([self.empty_1LE.expand_as(self.states_BLE), self.states_BLE])


class Sampler:
    """Draws images with the scheduler, text encoder and VAE of `pipeline`, and any UNet that fits between them.

    `guidance_scale` 1 runs the UNet once per image and step; above 1 each step is one UNet batch of 2B. A UNet with
    `time_cond_proj_dim` is told the scale instead, and runs once. `scheduler` takes the place of the pipeline's own.
    Stochastic schedulers draw from one generator per image, so they are as reproducible as the others (η is 0).
    `precision` is that of networks whose weights are float32: float32 strictly, tf32, or the UNet in bfloat16 by
    autocast and the decoder in TF32 where the device has it.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        steps: int,
        guidance_scale: float,
        seed: int = 0,
        scheduler=None,
        precision: str = "float32",
    ) -> None:
        """Raises ValueError for fewer than 1 step, and for what the scheduler cannot do: models/schedulers.py."""
        if steps < 1:
            raise ValueError(f"steps is {steps}; sampling needs at least 1")
        check_sampling(scheduler or pipeline.scheduler, steps)
        self.pipeline = pipeline
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.precision = precision
        self.scheduler = scheduler or pipeline.scheduler
        self._texts: dict[tuple[str, ...], Texts] = {}
        self._copies: dict[tuple, Tensor] = {}

    def guides(self, unet: nn.Module) -> bool:
        """Whether each step runs the UNet with the empty prompt, too."""
        return self.guidance_scale > 1 and not told_guidance_width(unet)

    def evaluations(self, unet: nn.Module) -> int:
        """How often the UNet is asked for one image; some schedulers ask more than once a step."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        return len(scheduler.timesteps) * (2 if self.guides(unet) else 1)

    @property
    def protocol(self) -> dict:
        """What an image depends on beside the networks and the prompt; goes into every record of a score."""
        scheduler = self.scheduler
        return {
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "scheduler": type(scheduler).__name__,
            "timestep_spacing": used_spacing(scheduler),
            "prediction_type": scheduler.config.get("prediction_type"),
            "latents": list(self.latent_shape),
            "precision": self.weights_precision,
        }

    @property
    def weights_precision(self) -> str:
        """What the networks compute in: `precision` is a choice where their weights are float32."""
        dtype = self.pipeline.unet.dtype
        return self.precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, H, W of the latents the pipeline's UNet was made for."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def noise(self, index: int) -> Tensor:
        """Unit noise [C, H, W] of image `index`, float32 on the CPU: the same for every device, batch and process."""
        return torch.randn(self.latent_shape, generator=generator("sample", self.seed, index))

    def generators(self, indices: Sequence[int]) -> list[torch.Generator]:
        """What stochastic schedulers draw from for the images `indices`, one each."""
        return [generator("scheduler", self.seed, index) for index in indices]

    def encode(self, prompts: Sequence[str]) -> Texts:
        """The text states of `prompts` on the CPU, computed once per prompt set."""
        key = tuple(prompts)
        if key not in self._texts:
            states = [self.encode_batch(key, k) for k in range(-(-len(key) // TEXTS_PER_BATCH))]
            self._texts[key] = Texts(torch.cat(states), self.empty_1LE)
        return self._texts[key]

    def encode_rows(self, prompts: Sequence[str], indices: Sequence[int]) -> Texts:
        """`encode(prompts).rows(indices)` without the states of all others, in memory or at all."""
        states = {k: self.encode_batch(prompts, k) for k in {i // TEXTS_PER_BATCH for i in indices}}
        rows = [states[i // TEXTS_PER_BATCH][i % TEXTS_PER_BATCH] for i in indices]
        return Texts(torch.stack(rows), self.empty_1LE)

    @torch.no_grad()
    def encode_batch(self, prompts: Sequence[str], k: int) -> Tensor:
        """The states of the k-th TEXTS_PER_BATCH prompts, on the CPU."""
        batch = prompts[k * TEXTS_PER_BATCH : (k + 1) * TEXTS_PER_BATCH]
        return text_states(self.pipeline, batch, self.pipeline.text_encoder.device).cpu()

    @cached_property
    @torch.no_grad()
    def empty_1LE(self) -> Tensor:
        """The state of the empty prompt, on the CPU."""
        return empty_text_state(self.pipeline, self.pipeline.text_encoder.device).cpu()

    def told_scale(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[1, width]: the guidance scale, as a UNet is told it."""
        scale = torch.tensor([float(self.guidance_scale)])
        return self.copied_once(("scale", device, dtype), lambda: guidance_embedding(scale, width).to(device, dtype))

    def copied_once(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """What every call needs on the device: a captured loop could not copy it there."""
        if key not in self._copies:
            self._copies[key] = make()
        return self._copies[key]

    def statistic(self, k: int, like: Tensor) -> Tensor:
        """[1, C, 1, 1]: the mean (k = 0) or standard deviation (1) of the VAE's latents."""
        key = ("statistics", k, like.device, like.dtype)
        return self.copied_once(key, lambda: statistics(self.pipeline.vae.config)[k].to(like))

    def latents(self, unet: nn.Module, *given, **options) -> Tensor:
        """What `denoise` gives; ValueError where it is not finite."""
        return finite({"latents": self.denoise(unet, *given, **options)}, unet)["latents"]

    @torch.inference_mode()
    def denoise(
        self,
        unet: nn.Module,
        texts: Texts,
        noise_BCHW: Tensor,
        block_mask_BN: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Denoised latents [B, C, H, W] from unit noise, on the UNet's device and in its dtype.

        `block_mask_BN` (bool, False where a row skips a block) is repeated for both halves of a guidance batch.
        `generators`, one per row, feed stochastic schedulers; by default they are seeded by the row.
        """
        parameter = next(unet.parameters())
        place = {"device": parameter.device, "dtype": parameter.dtype}
        guided, width = self.guides(unet), told_guidance_width(unet)
        text_BLE = (texts.with_unconditional() if guided else texts.states_BLE).to(**place)
        options = {}
        if block_mask_BN is not None:
            options["block_mask"] = both_halves(block_mask_BN, guided).to(parameter.device)
        if width:
            options["timestep_cond"] = self.told_scale(width, **place).expand(len(noise_BCHW), -1)
        if generators is None:
            generators = self.generators(range(len(noise_BCHW)))
        scheduler = copy.deepcopy(self.scheduler)  # it counts steps, and some keep past predictions
        scheduler.set_timesteps(self.steps)
        step_options = extra_step_options(scheduler, generators)
        # The scheduler reads its tables on the CPU, the UNet a tensor of its own device: no synchronisation per step.
        timesteps_S = self.copied_once(("t", parameter.device), lambda: scheduler.timesteps.to(parameter.device))

        z_BCHW = noise_BCHW.to(**place) * scheduler.init_noise_sigma
        for t, t_unet in zip(scheduler.timesteps, timesteps_S, strict=True):
            input_BCHW = scheduler.scale_model_input(both_halves(z_BCHW, guided), t)
            with computing(self.precision, parameter):
                pred_BCHW = unet(input_BCHW, t_unet, encoder_hidden_states=text_BLE, return_dict=False, **options)[0]
            pred_BCHW = pred_BCHW.to(z_BCHW.dtype)
            if guided:
                empty_BCHW, told_BCHW = pred_BCHW.chunk(2)
                pred_BCHW = empty_BCHW + self.guidance_scale * (told_BCHW - empty_BCHW)
            z_BCHW = scheduler.step(pred_BCHW, t, z_BCHW, return_dict=False, **step_options)[0]
        return z_BCHW

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W], on the VAE's device, rounded as diffusers rounds on its way to PIL.

        Raises ValueError for images that are not finite: as bytes they would be black, and as good as each other.
        """
        return eight_bits(finite({"images": self.pixels(latents_BCHW)}, self.pipeline.vae)["images"])

    @torch.inference_mode()
    def pixels(self, latents_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] from -1 to 1, as the VAE gives them."""
        vae = self.pipeline.vae
        z_BCHW = latents_BCHW.to(vae.device, vae.dtype)
        mean_std = [self.statistic(k, z_BCHW) for k in range(2)] if has_statistics(self.pipeline) else None
        z_BCHW = unscaled(z_BCHW, vae.config.scaling_factor, mean_std)
        slices = z_BCHW.split(rows_at_once(self.pipeline, *z_BCHW.shape[-2:]))
        with products_on(vae.device, self.precision):
            return torch.cat([vae.decode(z_bCHW, return_dict=False)[0] for z_bCHW in slices])

    def images(
        self, unet: nn.Module, prompts: Sequence[str], indices: Sequence[int], block_mask_BN: Tensor | None = None
    ) -> Tensor:
        """uint8 images [B, 3, H, W]: row b is prompt `indices[b]` of the whole set `prompts`, from that prompt's noise.

        An index may come several times, with different masks: every ablation of a prompt starts from the same noise.
        """
        texts = self.encode(prompts).rows(indices)

        def draw(network: nn.Module, rows: list[int], block_mask_BN: Tensor | None) -> Tensor:
            chosen = [indices[row] for row in rows]
            noise_BCHW = torch.stack([self.noise(i) for i in chosen])
            given = texts.rows(rows), noise_BCHW, block_mask_BN, self.generators(chosen)
            return self.decode(self.latents(network, *given))

        if can_be_parted(unet):
            return draw_in_parts(draw, unet, len(indices), block_mask_BN, math.prod(self.latent_shape[1:]))
        return draw(unet, list(range(len(indices))), block_mask_BN)


def eight_bits(pixels_BCHW: Tensor) -> Tensor:
    """uint8, from -1 to 1."""
    return ((pixels_BCHW * 0.5 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)


def both_halves(rows: Tensor, guided: bool) -> Tensor:
    return torch.cat([rows, rows]) if guided else rows


def extra_step_options(scheduler, generators: Sequence[torch.Generator]) -> dict:
    """What this scheduler's step takes beside the prediction: diffusers' schedulers differ."""
    taken = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"eta": 0.0, "generator": list(generators)}.items() if name in taken}
