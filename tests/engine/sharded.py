"""A training of a tiny network, alone or as one of several processes, plain or in FSDP2's shards on the CPU.

    python -m tests.engine.sharded ROOT NETWORK plain|fsdp [precision=bf16] [key=value …] [kill_at=STEP]

accelerate shards on GPUs only: here its state is told to on the CPU, and all that follows is its own code.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from omegaconf import OmegaConf

from distill.decoder import DecoderDistillation
from distill.recovery import Recovery
from engine.loop import train
from engine.run import Run
from engine.sections.training import TrainConfig
from models.decoding import ImageDecoder
from models.schedule import NoiseSchedule
from models.unet import PrunableUNet2DConditionModel
from prune.robust import RobustTraining
from tests.tiny import tiny_pipeline, tiny_sdxl_pipeline


def sharding_accelerator(mixed_precision: str) -> Accelerator:
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False,
    )  # fmt: skip
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    PartialState._shared_state["distributed_type"] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


class Latents(torch.utils.data.Dataset):
    def __init__(self, width: int, rows: int):
        draw = torch.Generator().manual_seed(0)
        self.latents, self.text = torch.randn(16, 4, 8, 8, generator=draw), torch.randn(
            16, rows, width, generator=draw
        )

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"latents": self.latents[index], "text": self.text[index]}


def network_and_objective(name: str):
    pipeline = tiny_sdxl_pipeline() if name == "sdxl" else tiny_pipeline()
    for network in (pipeline.unet, pipeline.vae):
        network.requires_grad_(False)
    if name == "decoder":
        student = ImageDecoder(tiny_pipeline().vae.requires_grad_(False))
        student.decoder.requires_grad_(True)
        return student, DecoderDistillation(ImageDecoder(pipeline.vae)), Latents(16, 16)
    rows, width = (17, 32) if name == "sdxl" else (16, 16)
    unet, schedule = PrunableUNet2DConditionModel.from_unet(pipeline.unet), NoiseSchedule.from_scheduler(
        pipeline.scheduler
    )
    given = {"schedule": schedule, "empty_text_LE": torch.zeros(rows, width), "teacher": pipeline.unet}
    objective = Recovery(**given) if name == "recovery" else RobustTraining(**given, skip_prob={"resnet": 0.2, "attention": 0.2})
    return unet.requires_grad_(), objective, Latents(width, rows)


def main(root: str, name: str, way: str, *overrides: str) -> None:
    given = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    kill_at, precision = given.pop("kill_at", None), given.pop("precision", "no")
    accelerator = sharding_accelerator(precision) if way == "fsdp" else Accelerator(cpu=True, mixed_precision=precision)
    network, objective, latents = network_and_objective(name)

    def dying(model, batch, generator):
        if kill_at and batch["progress"] >= kill_at / config.steps:
            raise KeyboardInterrupt
        return objective(model, batch, generator)

    config = TrainConfig(**{"steps": 6, "batch_size": 2, "warmup_steps": 0, "log_every": 1, "checkpoint_every": 2, **given})
    trained = train(network, dying, latents, config, Run(Path(root), accelerator), "stage")
    assert trained is network and type(next(trained.parameters())) is torch.nn.Parameter
    assert not torch.distributed.tensor.DTensor in {type(p.data) for p in trained.parameters()}
    torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
