"""Stochastic-depth training (SnapFusion's "robust training", section 3.1, eq. 5): the UNet learns to work without any
of its blocks.

Axes: B batch, N blocks, C channels, H and W latent size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from slimstep.engine.checks import check_choice, check_fraction
from slimstep.engine.objective import Batch, Metrics
from slimstep.models.conditioning import Conditioning
from slimstep.models.denoiser import Denoiser
from slimstep.models.denoising import draw_noisy
from slimstep.models.noise_schedule import NoiseSchedule

RAMPS = ("constant", "depth", "time")
KINDS = ("resnet", "attention", "transformer", "sublayer")  # of blocks


@dataclass(eq=False)
class StochasticDepth:
    """The denoising loss of a UNet in which every block is skipped at random, per sample and independently.

    `skip_prob` gives the probability per kind of block. `ramp` says how it is spread: `constant`; `depth`, rising
    linearly from zero at the first block to the full value at the last (in order of execution); `time`, rising linearly
    over the training. The paper publishes none of these. With a `teacher_weight` w above zero the loss is the mixture
    (1 − w)·‖pred − target‖² + w·‖pred − teacher's pred‖²; the teacher runs with all its blocks.

    Raises ValueError for a probability outside [0, 1), an unknown kind or an unknown ramp.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    uncond: Conditioning
    teacher: nn.Module
    skip_prob: Mapping[str, float]
    ramp: str = "constant"
    caption_dropout: float = 0.1
    teacher_weight: float = 0.0

    def __post_init__(self) -> None:
        skip_prob, bare = self.skip_prob, extract_model_from_parallel(self.teacher, keep_torch_compile=False)
        kinds = {*bare.kinds.values()} if hasattr(bare, "kinds") else {"resnet", "attention"}
        if not kinds <= set(skip_prob) <= set(KINDS) or not all(0 <= p < 1 for p in skip_prob.values()):
            names = " and ".join(kind for kind in KINDS if kind in kinds)
            raise ValueError(f"objective.skip_prob={dict(skip_prob)} must give {names} a value in [0, 1)")
        check_choice("objective", self, ramp=RAMPS)
        check_fraction("objective", caption_dropout=self.caption_dropout, teacher_weight=self.teacher_weight)
        self.copied: dict[tuple, Tensor] = {}

    def skip_probs(self, kinds: list[str], progress: float, device: str | torch.device = "cpu") -> Tensor:
        """Shape [N]: each block's probability of being skipped at this point of the training."""
        key = (*kinds, str(device))
        if key not in self.copied:  # once: a copy at every step would wait for the device
            full_N = torch.tensor([self.skip_prob[kind] for kind in kinds])
            depth_N = torch.linspace(0, 1, len(kinds)) if self.ramp == "depth" else 1
            self.copied[key] = (full_N * depth_N).to(device)
        return self.copied[key] * progress if self.ramp == "time" else self.copied[key]

    def __call__(self, unet: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        noisy = draw_noisy(batch, self.schedule, self.uncond, self.caption_dropout, generator)
        bare = extract_model_from_parallel(unet, keep_torch_compile=False)
        kinds = [bare.kinds[block] for block in bare.kept_blocks]
        probs_N = self.skip_probs(kinds, batch["progress"], noisy.t_B.device)
        uniform_BN = torch.rand((len(noisy.t_B), len(kinds)), generator=generator, device=noisy.t_B.device)
        pred_BCHW = self.denoiser(unet, *noisy.inputs, block_mask_BN=uniform_BN >= probs_N)
        loss = nn.functional.mse_loss(pred_BCHW, noisy.target_BCHW)
        metrics = {"denoising": loss}
        if self.teacher_weight:
            with torch.no_grad():
                target_BCHW = self.denoiser(self.teacher, *noisy.inputs)
            metrics["to_teacher"] = nn.functional.mse_loss(pred_BCHW, target_BCHW)
            loss = torch.lerp(loss, metrics["to_teacher"], self.teacher_weight)
        return loss, metrics
