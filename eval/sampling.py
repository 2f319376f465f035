"""Sampling inside the framework: what the stock pipeline would draw, for any network, with a block mask per sample.

Timesteps, scheduler, guidance rule and rounding to 8 bits are those of `StableDiffusionPipeline.__call__`; what differs
is the noise, which belongs to the prompt: image i is a function of (seed, i), whatever batch or process draws it.

Axes: B batch, C channels, F frames, H and W height and width, N blocks that the network kept, S steps. What is written
BCHW of latents is BCFHW of videos.
"""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimstep.data.encoding import finite, rows_at_once
from slimstep.engine.seeding import generator
from slimstep.eval.cpu_parts import Draw, can_be_parted, draw_in_parts
from slimstep.eval.timing.precision import computing, products_on
from slimstep.models.conditioning import Conditioning
from slimstep.models.decoding import decoded_images, has_statistics, is_tiled, scaling_of, statistics, unscaled
from slimstep.models.denoiser import Denoiser, takes_guidance
from slimstep.models.families.deepfloyd.cascade import first_stage_of, refines, upscaled
from slimstep.models.family import denoiser_of, family_of, flow_of, with_variance
from slimstep.models.first_frames import call_options, video_options
from slimstep.models.flow import prediction_type_of, set_steps
from slimstep.models.guidance import guided
from slimstep.models.networks import network_of, sequence_length
from slimstep.models.pipeline import encoders_on, on_device
from slimstep.models.schedulers import check_sampling, keeps_past, reads_variance, used_spacing
from slimstep.models.sizes import frames_per_latent, native_frames, scale_factor

TEXTS_PER_BATCH = 64  # cut by index, so that a prompt's state does not depend on who asks for it


@dataclass(eq=False)
class Sampler:
    """Draws images with the scheduler, text encoder and VAE of `pipeline`, as far as it has them, and any UNet that
    fits between them.

    `guidance_scale` from 0 to 1 runs the UNet once per image and step; above 1 each step is one UNet batch of 2B. A
    UNet with guidance embedding takes the scale instead, and runs once. `scheduler` takes the place of the pipeline's
    own. Stochastic schedulers draw from one generator per image, so they are as reproducible as the others (η is 0).
    `precision` is that of networks whose weights are float32: float32 strictly, tf32, or the UNet in bfloat16 by
    autocast and the decoder in TF32 where the device has it.

    Raises ValueError for fewer than 1 step, for guidance of a model that has none, and for what the scheduler cannot
    do: models/schedulers.py.
    """

    pipeline: DiffusionPipeline
    steps: int
    guidance_scale: float
    seed: int = 0
    scheduler: Any = None  # of diffusers; the pipeline's own where there is none
    precision: str = "float32"

    def __post_init__(self) -> None:
        pipeline, scale = self.pipeline, self.guidance_scale
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; sampling needs at least 1")
        self.family, self.codec = family_of(pipeline), family_of(pipeline).codec(pipeline)
        self.network, self.flow = network_of(pipeline), flow_of(pipeline)
        self.scheduler = self.scheduler or pipeline.scheduler
        check_sampling(self.scheduler, self.steps, self.flow)
        if keeps_past(self.scheduler.step) and not keeps_past(type(pipeline).__call__):
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} takes its last prediction in each step, which no {type(pipeline).__name__} keeps")
        if reads_variance(self.scheduler) and with_variance(self.denoiser) is None:
            named = f"DDPMScheduler has variance_type={self.scheduler.config.variance_type}"
            kind = type(self.network).__name__
            raise ValueError(f"{named}, and a {kind} predicts no variance here: model.scheduler=ddim")
        if scale > 1 and not (self.family.GUIDES or takes_guidance(self.network)):
            keys = "eval.guidance_scale, scoring.guidance_scale, latents.guidance_scale, curves.guidance"
            raise ValueError(
                f"guidance_scale={scale:g}: {type(pipeline).__name__} has no guidance; set 1 in "
                f"what the job has of {keys}"
            )
        self._encoded: dict[tuple[str, ...], Conditioning] = {}
        self._copies: dict[tuple, Tensor] = {}

    def reseeded(self, seed: int) -> "Sampler":
        """The same with other noise; what is encoded serves both."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def guides(self, unet: nn.Module) -> bool:
        """Whether each step runs the UNet with the empty prompt, too."""
        return self.guidance_scale > 1 and self.family.GUIDES and not takes_guidance(unet)

    def evaluations(self, unet: nn.Module) -> int:
        """How often the UNet is asked for one image; some schedulers ask more than once a step."""
        return len(self.starts) * (2 if self.guides(unet) else 1)

    @property
    def starts(self) -> Tensor:
        """[evaluations of one row]: the timesteps at which the UNet is asked."""
        scheduler = copy.deepcopy(self.scheduler)
        set_steps(scheduler, self.steps, self.flow)
        return scheduler.timesteps.cpu()

    @property
    def protocol(self) -> dict:
        """What an image depends on beside the networks and the prompt; goes into every record of a score."""
        scheduler, length = self.scheduler, sequence_length(self.pipeline)
        terminal = scheduler.config.get("shift_terminal")
        return {
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "scheduler": type(scheduler).__name__,
            "timestep_spacing": used_spacing(scheduler),
            "prediction_type": prediction_type_of(scheduler),
            "latents": list(self.latent_shape),
            "precision": self.weights_precision,
            **({"shift_terminal": terminal} if terminal else {}),
            **({"vae_tiling": True} if is_tiled(self.codec) else {}),
            **({"max_sequence_length": length} if length else {}),
            **({"video": options} if (options := call_options(self.pipeline)) else {}),
            **({"first_stage": first_stage_of(self.pipeline).protocol} if refines(self.pipeline) else {}),
        }

    @property
    def weights_precision(self) -> str:
        """What the networks compute in: `precision` is a choice where their weights are float32."""
        dtype = self.network.dtype
        return self.precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")

    @property
    def denoiser(self) -> Denoiser:
        """How the pipeline's UNet, and any that takes its place, is called."""
        return denoiser_of(self.network, prediction_type_of(self.scheduler))

    @property
    def stepping_denoiser(self) -> Denoiser:
        """The same, with the predicted variance, where the scheduler's step takes one."""
        both = with_variance(self.denoiser) if reads_variance(self.scheduler) else None
        return both or self.denoiser

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """C, H, W, or C, F, H, W, of the latents the pipeline's network was made for."""
        return self.denoiser.sample_shape

    def noise(self, index: int) -> Tensor:
        """Unit noise of image `index`, float32 on the CPU: the same for every device, batch and process."""
        return torch.randn(self.latent_shape, generator=generator("sample", self.seed, index))

    def generators(self, indices: Sequence[int]) -> list[torch.Generator]:
        """What stochastic schedulers draw from for the images `indices`, one each."""
        return [generator("scheduler", self.seed, index) for index in indices]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of `prompts` on the CPU, computed once per prompt set."""
        key = tuple(prompts)
        if key not in self._encoded:
            with self.encoding():
                batches = [self.encode_batch(key, k) for k in range(-(-len(key) // TEXTS_PER_BATCH))]
            self._encoded[key] = Conditioning.cat(*batches)
        return self._encoded[key]

    def encoding(self) -> AbstractContextManager[None]:
        """While it is entered text encoders are where the pipeline's network is; what encodes enters it, too."""
        return encoders_on(self.pipeline, next(self.network.parameters()).device)

    def encode_rows(self, prompts: Sequence[str], indices: Sequence[int]) -> Conditioning:
        """`encode(prompts).rows(indices)` without all others, in memory or at all."""
        batches = {k: self.encode_batch(prompts, k) for k in {i // TEXTS_PER_BATCH for i in indices}}
        return Conditioning.cat(*(batches[i // TEXTS_PER_BATCH].rows([i % TEXTS_PER_BATCH]) for i in indices))

    @torch.no_grad()
    def encode_batch(self, prompts: Sequence[str], k: int) -> Conditioning:
        """The conditioning of the k-th TEXTS_PER_BATCH prompts, on the CPU."""
        batch = prompts[k * TEXTS_PER_BATCH : (k + 1) * TEXTS_PER_BATCH]
        with self.encoding():
            return self.family.encode(self.pipeline, batch).to("cpu")

    @cached_property
    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """The conditioning of the empty prompt, one row, on the CPU."""
        with self.encoding():
            return self.family.unconditional(self.pipeline).to("cpu")

    def copied_once(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """What every call needs on the device: a captured loop could not copy it there."""
        if key not in self._copies:
            self._copies[key] = make()
        return self._copies[key]

    def statistic(self, k: int, like: Tensor) -> Tensor:
        """[1, C, 1, 1]: the mean (k = 0) or standard deviation (1) of the VAE's latents."""
        key = ("statistics", k, like.device, like.dtype)
        return self.copied_once(key, lambda: statistics(self.pipeline.vae.config)[k].to(like))

    def latents(self, unet: nn.Module, *given: Any, **options: Any) -> Tensor:
        """What `denoise` gives; ValueError where it is not finite."""
        return finite({"latents": self.denoise(unet, *given, **options)}, unet)["latents"]

    def latents_at(self, unet: nn.Module, cond: Conditioning, indices: Sequence[int], **options: Any) -> Tensor:
        """The latents of the images `indices`, whose conditioning is `cond`, each from its own noise."""
        noise_BCHW = torch.stack([self.noise(i) for i in indices])
        cond = self.with_pictures(cond, indices)
        return self.latents(unet, cond, noise_BCHW, generators=self.generators(indices), **options)

    def with_pictures(self, cond: Conditioning, indices: Sequence[int]) -> Conditioning:
        """The conditioning of the images `indices`, and, of a second stage, the pictures that its first draws of the
        same text states, each once (families/deepfloyd/cascade.py)."""
        if not refines(self.pipeline) or "upscaled" in cond.tensors:
            return cond
        stage, text_BLE = first_stage_of(self.pipeline), cond.tensors["text"]
        keys = [(self.seed, i, hash(text.float().numpy().tobytes())) for i, text in zip(indices, text_BLE, strict=True)]
        rows = list({key: row for row, key in enumerate(keys) if (*key, self.precision) not in stage.pictures}.values())
        if rows:
            first = Sampler(stage.pipeline, stage.steps, stage.guidance_scale, self.seed, precision=self.precision)
            first.__dict__["unconditional"] = self.unconditional  # it has no text encoder
            with on_device(stage.pipeline.unet, next(self.network.parameters()).device) as network:
                drawn = first.latents_at(network, cond.rows(rows), [indices[row] for row in rows]).cpu()
            stage.pictures.update({(*keys[row], self.precision): x for row, x in zip(rows, drawn, strict=True)})
        pictures = torch.stack([stage.pictures[(*key, self.precision)] for key in keys]).to(text_BLE.dtype)
        noise = [torch.randn(self.latent_shape, generator=generator("upscaled", self.seed, i)) for i in indices]
        level_B = torch.full((len(indices),), stage.noise_level)
        shown = upscaled(self.pipeline, pictures, torch.stack(noise).to(pictures), level_B)
        return Conditioning({**cond.tensors, **shown})

    def conditions(self, prompts: Sequence[str], indices: Sequence[int]) -> Conditioning:
        """What the images `indices` of the whole set `prompts` are conditioned on, on the CPU."""
        return self.with_pictures(self.encode(prompts).rows(indices), indices)

    @torch.inference_mode()
    def denoise(
        self,
        unet: nn.Module,
        cond: Conditioning,
        noise_BCHW: Tensor,
        block_mask_BN: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        uncond: Conditioning | None = None,
        inputs: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Denoised latents [B, C, H, W] from unit noise, on the UNet's device and in its dtype.

        `block_mask_BN`: bool, False where a row skips a block. `generators`, one per row, feed stochastic schedulers;
        by default they are seeded by the row. `uncond` takes the place of `unconditional`, from which guidance leads.
        `inputs` is given x_t [B, C, H, W] and its timestep for every evaluation.
        """
        parameter = next(unet.parameters())
        place = parameter.device, parameter.dtype
        denoiser, away = self.stepping_denoiser, None
        cond = cond.to(*place)
        if self.guides(unet):
            away = (self.unconditional if uncond is None else uncond).to(*place)
        if block_mask_BN is not None:
            block_mask_BN = block_mask_BN.to(parameter.device)
        guidance_B = self.guidance(unet, len(noise_BCHW))
        if generators is None:
            generators = self.generators(range(len(noise_BCHW)))
        scheduler = copy.deepcopy(self.scheduler)  # it counts steps, and some keep past predictions
        set_steps(scheduler, self.steps, self.flow)
        # The scheduler reads its tables on the CPU, the UNet a tensor of its own device: no synchronisation per step.
        timesteps_S = self.copied_once(("t", parameter.device), lambda: scheduler.timesteps.to(parameter.device))

        z_BCHW = noise_BCHW.to(*place) * getattr(scheduler, "init_noise_sigma", 1)  # flow matching's has none
        for t, t_unet in zip(scheduler.timesteps, timesteps_S, strict=True):
            x_t = scheduler.scale_model_input(z_BCHW, t) if hasattr(scheduler, "scale_model_input") else z_BCHW
            if inputs is not None:
                inputs.append((x_t, t_unet))
            with computing(self.precision, parameter):
                if away is not None:
                    led = x_t, t_unet, cond, away, self.guidance_scale
                    pred_BCHW, _ = guided(denoiser, unet, *led, block_mask_BN=block_mask_BN)
                else:
                    own = {"guidance_B": guidance_B, "block_mask_BN": block_mask_BN}
                    pred_BCHW = denoiser(unet, x_t, t_unet, cond, **own)
            z_BCHW = next_latents(scheduler, pred_BCHW, t, z_BCHW, generators)
        return z_BCHW

    def guidance(self, unet: nn.Module, rows: int) -> Tensor | None:
        """The scale [B] that a network with guidance embedding takes; None for others."""
        if not takes_guidance(unet):
            return None
        scale, device = float(self.guidance_scale), next(unet.parameters()).device
        guidance_1 = self.copied_once(("scale", device), lambda: torch.full((1,), scale, device=device))
        return guidance_1.expand(rows)

    @torch.inference_mode()
    def predict(self, unet: nn.Module, *given: Any) -> Tensor:
        """What `prediction` gives, without gradients."""
        return self.prediction(unet, *given)

    def prediction(
        self, unet: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning, block_mask_BN: Tensor | None = None
    ) -> Tensor:
        """One prediction [B, C, H, W], without the empty prompt's, at an input of `denoise` (its `inputs`)."""
        parameter = next(unet.parameters())
        x_BCHW, cond = x_BCHW.to(parameter.device, parameter.dtype), cond.to(parameter.device, parameter.dtype)
        own = {"guidance_B": self.guidance(unet, len(x_BCHW)), "block_mask_BN": block_mask_BN}
        with computing(self.precision, parameter):
            return self.denoiser(unet, x_BCHW, t_B.to(parameter.device), cond, **own)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W], or videos [B, F, H, W, 3], on the VAE's device where there is one, rounded as
        diffusers does for PIL.

        Raises ValueError for images that are not finite: as bytes they would be black, and as good as each other.
        """
        images = eight_bits(finite({"images": self.pixels(latents_BCHW)}, self.codec or self.network)["images"])
        return images if images.ndim == 4 else images.movedim(1, -1).contiguous()

    @torch.inference_mode()
    def pixels(self, latents_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W] or videos [B, 3, F, H, W] from -1 to 1, as the VAE gives them."""
        if (vae := self.codec) is None:
            return latents_BCHW
        z_BCHW = self.of_video(latents_BCHW).to(vae.device, vae.dtype)
        mean_std = (self.statistic(0, z_BCHW), self.statistic(1, z_BCHW)) if has_statistics(self.pipeline) else None
        z_BCHW = unscaled(z_BCHW, scaling_of(vae), mean_std)
        sides = (side * scale_factor(self.pipeline) for side in z_BCHW.shape[-2:])
        slices = z_BCHW.split(rows_at_once(*z_BCHW.shape[2:-2], *sides))
        with products_on(vae.device, self.precision):
            at_once = video_options(self.pipeline).decode_chunk_size
            return torch.cat([decoded_images(vae, z_bCHW, at_once) for z_bCHW in slices])

    def of_video(self, latents_BCHW: Tensor) -> Tensor:
        """The latents without those that the network was given before a video's own (models/sizes.py), if any."""
        if not (frames := native_frames(self.pipeline)):
            return latents_BCHW
        count = (frames - 1) // frames_per_latent(self.pipeline) + 1
        return latents_BCHW[:, :, -count:]

    def images(
        self, unet: nn.Module, prompts: Sequence[str], indices: Sequence[int], block_mask_BN: Tensor | None = None
    ) -> Tensor:
        """uint8 images [B, 3, H, W] or videos [B, F, H, W, 3]: row b is prompt `indices[b]` of the whole set `prompts`,
        from that prompt's noise.

        An index may come several times, with different masks: every ablation of a prompt starts from the same noise.
        """
        cond = self.conditions(prompts, indices)  # here, not by as many threads as draw
        uncond = self.unconditional if self.guides(unet) else None

        def draw(network: nn.Module, rows: list[int], block_mask_BN: Tensor | None) -> Tensor:
            options = {"block_mask_BN": block_mask_BN, "uncond": uncond}
            return self.decode(self.latents_at(network, cond.rows(rows), [indices[row] for row in rows], **options))

        return self.in_parts(draw, unet, len(indices), block_mask_BN)

    def in_parts(self, draw: Draw, unet: nn.Module, rows: int, block_mask_BN: Tensor | None = None) -> Tensor:
        """`draw(network, row numbers, mask)` of all rows: at once, or as a CPU does it best (eval/cpu_parts.py)."""
        if can_be_parted(unet):
            return draw_in_parts(draw, unet, rows, block_mask_BN, math.prod(self.latent_shape[1:]))
        return draw(unet, list(range(rows)), block_mask_BN)


def eight_bits(pixels_BCHW: Tensor) -> Tensor:
    """uint8, from -1 to 1."""
    return ((pixels_BCHW * 0.5 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)


def next_latents(scheduler: Any, pred: Tensor, t: Tensor, z: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Where a scheduler's step lands, with what it takes beside the prediction: diffusers' schedulers differ."""
    taken = inspect.signature(scheduler.step).parameters
    options = {name: value for name, value in {"eta": 0.0, "generator": list(generators)}.items() if name in taken}
    if not keeps_past(scheduler.step):
        return scheduler.step(pred, t, z, return_dict=False, **options)[0]
    x0, before = getattr(scheduler, "past", (None, None))  # which CogVideoX's pipeline keeps for its DPM solver
    z, x0 = scheduler.step(pred, x0, t, before, z, return_dict=False, **options)
    scheduler.past = x0, t
    return z
