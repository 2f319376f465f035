"""Trainings of tiny networks, alone or as one of several processes, whole or in FSDP2's shards, on the CPU.

    python -m tests.engine.sharded plain|ddp|fsdp PRECISION ROOT NETWORK [kill_at=STEP] [KEY=VALUE …] [-- ROOT …]

A process takes seconds to start, and so does several trainings in turn. accelerate shards on GPUs only: here its state
is set so on the CPU, and all that follows is its own code.
"""

import sys
from functools import partial
from itertools import groupby

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from diffusers import DDIMScheduler
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import StackDataset, default_collate

from slimstep.distill.decoder import DecoderDistillation
from slimstep.distill.dmd import DistributionMatching
from slimstep.distill.recovery import Recovery
from slimstep.distill.teaching import StepSchedule
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import train
from slimstep.engine.objective import STUDENT, Objective, PlainObjective, as_objective
from slimstep.engine.run import Run
from slimstep.models.decoding import ImageDecoder
from slimstep.models.families.unet2d.network import PrunableUNet2DConditionModel
from slimstep.models.family import denoiser_of
from slimstep.models.noise_schedule import schedule_of
from slimstep.prune.stochastic_depth import StochasticDepth
from tests.engine import two_networks
from tests.tiny import tiny_pipeline, tiny_sdxl_pipeline

SHORT = {"steps": 6, "batch_size": 2, "warmup_steps": 0, "log_every": 1, "checkpoint_every": 2}


def main(way: str, precision: str, *words: str) -> None:
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="eager")  # inductor takes minutes
    plugin = {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=2)} if way == "deepspeed" else {}
    accelerator = Accelerator(cpu=way != "deepspeed", mixed_precision=precision, **plugin)
    if way == "fsdp":
        shard(accelerator, precision)
    for is_separator, training in groupby(words, "--".__eq__):
        if not is_separator:
            run_training(accelerator, *training)
    accelerator.end_training()


def run_training(accelerator: Accelerator, root: str, name: str, *overrides: str) -> None:
    options = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    kill_at = options.pop("kill_at", None)
    config = TrainConfig(**{**SHORT, **options})
    network, objective, samples = subject(name)

    objective = as_objective(objective)
    loss = objective.loss

    def mortal(networks, batch, generator, update):
        if kill_at and batch["progress"] * config.steps >= kill_at:
            raise KeyboardInterrupt
        return loss(networks, batch, generator, update)

    objective.loss = mortal

    trained = train(network, objective, samples, config, Run(root, accelerator), "stage")
    assert trained is network and {type(p) for p in trained.parameters()} == {nn.Parameter}
    batch = default_collate([samples[i] for i in range(2)])
    with torch.no_grad(), accelerator.autocast():  # it can be called as before
        loss({STUDENT: trained, **objective.networks}, {**batch, "progress": 1.0}, torch.Generator(), STUDENT)


def shard(accelerator: Accelerator, precision: str) -> None:
    """What configs/accelerate/fsdp.yaml asks for."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
    )  # fmt: skip
    if precision != "no":
        plugin.set_mixed_precision(precision)
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def subject(name: str) -> tuple[nn.Module, Objective | PlainObjective, StackDataset]:
    """A network and what it learns: sdxl by stochastic depth, sd15 by recovery, a decoder, whose first layer is frozen,
    two networks, or a student and its fake score by distribution matching."""
    if name == "two":
        points = torch.randn((16, 3), generator=torch.Generator().manual_seed(0))
        return two_networks.network(seed=0), two_networks.FakeScore(), StackDataset(x=points)
    pipeline, draw = (tiny_sdxl_pipeline if name == "sdxl" else tiny_pipeline)(), torch.Generator().manual_seed(0)
    denoiser = denoiser_of(pipeline.unet)
    latents, _, cond = denoiser.example(pipeline.unet, 16, tokens=16, generator=draw)
    samples = StackDataset(latents=latents, **cond.tensors)
    pipeline.vae.requires_grad_(False)
    if name == "decoder":
        student = ImageDecoder(tiny_pipeline().vae.requires_grad_(False))
        student.decoder.requires_grad_(True)
        return student, DecoderDistillation(ImageDecoder(pipeline.vae)), samples
    unet = PrunableUNet2DConditionModel.from_unet(pipeline.unet)
    schedule = schedule_of(pipeline.scheduler)
    uncond = cond.rows([0]).map(torch.zeros_like)
    options = denoiser, schedule, uncond, pipeline.unet.requires_grad_(False)
    if name == "recovery":
        return unet, Recovery(*options), samples
    if name == "dmd":
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        way, adversarial = StepSchedule(scheduler, 4, scheduler, 2), {"fake_updates": 2, "adversarial_weight": 0.1}
        return unet, DistributionMatching(*options, way, lambda: pipeline.unet, **adversarial), samples
    return unet, StochasticDepth(*options, skip_prob={"resnet": 0.2, "attention": 0.2}), samples


if __name__ == "__main__":
    main(*sys.argv[1:])
