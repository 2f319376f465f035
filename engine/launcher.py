"""What accelerate's launcher asks for by the environment: it is done, or refused in one line, and never half of it.

Done: the processes and machines, --cpu, FSDP2, ZeRO-2, and --mixed_precision where the run's own `mixed_precision` is
not given. What this project's loop does by keys of its own is refused here: accelerate would divide gradients without
accumulating any, or compile what `train.compile` leaves alone. Nothing imports torch.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger("slimstep")
OFF = ("", "no", "false", "0", "none", "auto")
REFUSED = {  # variable: the launcher's flag or key, and what does it here
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "train.accumulation=N accumulates"),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "train.max_grad_norm=X clips"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "train.compile=true compiles"),
    "ACCELERATE_FP8_BACKEND": ("fp8_backend", "mixed_precision=bf16 trains, benchmark.quantize=[fp8] times"),
    "ACCELERATE_USE_MEGATRON_LM": ("use_megatron_lm", "+hardware=fsdp shards"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("use_parallelism_config", "+hardware=fsdp shards"),
}
OF_DEEPSPEED = {  # of its JSON file: what may stand there, and what does it here
    "gradient_accumulation_steps": (("auto", 1), "raise train.batch_size"),
    "gradient_clipping": (("auto",), "train.max_grad_norm=X clips"),
    "train_micro_batch_size_per_gpu": (("auto",), "train.batch_size=N says it"),
    "train_batch_size": (("auto",), "train.batch_size=N says it"),
    "zero_optimization.stage": ((0, 1, 2), "stage 2 it is, or +hardware=fsdp"),
    "fp16.enabled": ((False,), "torch_autocast there, as in configs/accelerate/zero2.json"),
    "bf16.enabled": ((False,), "torch_autocast there, as in configs/accelerate/zero2.json"),
}


def precision_of(environment: Mapping[str, str]) -> str:
    """The launcher's --mixed_precision, or that of its file; "no" without it."""
    return environment.get("ACCELERATE_MIXED_PRECISION", "").lower() or "no"


def is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")


def check_launcher(environment: Mapping[str, str], config: DictConfig) -> None:
    """ValueError for what the launcher asks for and this project does otherwise; a warning where ours wins."""
    for name, (flag, way) in REFUSED.items():
        value = environment.get(name, "")
        if value.lower() not in OFF and not (name.endswith("_STEPS") and value == "1"):
            raise ValueError(f"accelerate's {flag} ({name}={value}) is not this project's: {way}; take it out there")
    place = environment.get("ACCELERATE_TORCH_DEVICE", "cpu")
    if place.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"ACCELERATE_TORCH_DEVICE={place} is none that this project runs on: cuda or cpu")
    if is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        check_deepspeed(environment, config.mixed_precision)
    if is_on(environment, "ACCELERATE_USE_FSDP"):
        check_fsdp(environment)
    requested = precision_of(environment)
    if requested not in ("no", config.mixed_precision):
        log.warning(f"mixed_precision={config.mixed_precision} is this run's, and not accelerate's {requested}")
    if is_on(environment, "ACCELERATE_USE_CPU") and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        log.warning("this is one process: accelerate launch --cpu starts more with mpirun alone; instead: "
                    "ACCELERATE_USE_CPU=true torchrun --nproc_per_node=N train.py …")  # fmt: skip


def check_deepspeed(environment: Mapping[str, str], mixed_precision: str) -> None:
    """ValueError for what ZeRO-2 beside this project's loop cannot be."""
    if mixed_precision != "no":
        raise ValueError(
            f"mixed_precision={mixed_precision} under DeepSpeed would hold the trained weights in it: "
            f"mixed_precision=no, and torch_autocast in DeepSpeed's file, as +hardware=deepspeed has it"
        )
    if environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise ValueError("accelerate's zero_stage=3 (ACCELERATE_DEEPSPEED_ZERO_STAGE) cuts weights: choose 2, or FSDP")
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file.lower() == "none":
        return
    try:
        content = OmegaConf.create(json.loads(Path(file).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"DeepSpeed's file {file} cannot be read: {error}") from error
    for key, (fitting, way) in OF_DEEPSPEED.items():
        value: Any = OmegaConf.select(content, key)
        if value is not None and not any(value == one and type(value) is type(one) for one in fitting):
            raise ValueError(f"{file}: {key}={value} is not this project's: {way}")


def check_fsdp(environment: Mapping[str, str]) -> None:
    """ValueError for the kinds of FSDP that this project does not train with."""
    if environment.get("FSDP_VERSION", "2") != "2":
        raise ValueError(f"fsdp_version={environment['FSDP_VERSION']}: training in shards is FSDP2's here, "
                         f"--fsdp_version 2, as in configs/accelerate/fsdp.yaml")  # fmt: skip
    if is_on(environment, "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        # transformers then leaves the weights of text encoders out on every rank but one.
        raise ValueError("fsdp_cpu_ram_efficient_loading=true would leave frozen networks without weights: false, "
                         "as in configs/accelerate/fsdp.yaml")  # fmt: skip
