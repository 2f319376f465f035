"""The model card of an export: README.md in its folder, as model hubs show it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimstep.engine.artifacts import CARD
from slimstep.engine.files import write_text
from slimstep.models.architecture import as_architecture

EXPORT_REPORT = "export_report.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GUIDANCE = {  # where a pipeline calls it so
    "QwenImageTransformer2DModel": 'negative_prompt=" ", true_cfg_scale={:g}',
    **dict.fromkeys(("UNetSpatioTemporalConditionModel", "PrunableUNetSpatioTemporalConditionModel"),
                    "max_guidance_scale={:g}"),
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """Whose student an export is, and how it is sampled: diffusers keeps none of this in a folder."""

    teacher: str
    steps: int
    guidance_scale: float
    max_sequence_length: int | None = None  # None: the default of its pipeline, if that has one
    trained_steps: int | None = None  # those that its network was distilled to, None where it learnt all timesteps
    video: Mapping[str, Any] | None = None  # what is said beside a first frame, where the pipeline is given one


@dataclass(frozen=True)
class Reading:
    """Whether a program reads an export's network, and why."""

    reads: bool
    why: str


def read_export_report(folder: Path) -> dict[str, Any] | None:
    """What `export_pipeline` said of a folder that it wrote; None for other folders. Earlier versions called the file
    verdict.json."""
    files = [folder / name for name in (EXPORT_REPORT, "verdict.json")]
    return next((json.loads(file.read_text()) for file in files if file.is_file()), None)


def origin_of(folder: str | Path) -> Origin | None:
    """What an export says of itself; None for other folders, and for exports of before there were cards."""
    fields = (read_export_report(Path(folder)) or {}).get("origin")
    return fields and Origin(**fields)


def write_card(folder: Path, results: Sequence[str] = ()) -> None:
    """README.md of an export that has an origin: what it is, how it is sampled, and a line for every result."""
    report = read_export_report(folder)
    files = {part: folder / part / "config.json" for part in ("unet", "transformer", "vae")}
    configs = {part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()}
    options = report["load"].rpartition('"')[2].removesuffix(")")  # what it is loaded with beside the folder
    read_by = {program: Reading(**fields) for program, fields in report.get("readers", {}).items()}
    origin = Origin(**report["origin"])
    removed = [block for block, paths in report.get("blocks", {}).items() if not paths]
    write_text(folder / CARD, card_text(origin, report["is_stock"], options, configs, results, read_by, removed))


def card_text(
    origin: Origin, is_stock: bool, options: str, configs: Mapping[str, Mapping[str, Any]], results: Sequence[str],
    read_by: Mapping[str, Reading], removed: Sequence[str],
) -> str:  # fmt: skip
    is_hub = HUB_ID.fullmatch(origin.teacher) and not Path(origin.teacher).exists()
    teacher = origin.teacher if is_hub else Path(origin.teacher).stem
    base = f"base_model: {teacher}\n" if is_hub else ""
    trust = "" if is_stock else " The folder carries the classes of its networks, hence `trust_remote_code=True`."
    has_prompts = "vae" in configs  # models of pixels are unconditional
    part, name = ("unet", "UNet") if "unet" in configs else ("transformer", "Transformer")
    count = configs[part].get("sample_frames") or configs[part].get("num_frames")
    what, output = ("video", "frames") if count else ("image", "images")
    has_frame = origin.video is not None
    task = f"{'image' if has_frame else 'text'}-to-{what}" if has_prompts else "unconditional-image-generation"
    length = f", max_sequence_length={origin.max_sequence_length}" if origin.max_sequence_length else ""
    said = f" at guidance {origin.guidance_scale:g}{length.replace('=', ' ')}"
    guidance = f"{said}. Pass {'all' if length or count else 'both'}: diffusers' defaults are others."
    guidance = guidance if has_prompts else ". Pass them: diffusers' default is another."
    frames = f", num_frames={count}" if count else ""
    call = f"num_inference_steps={origin.steps}{frames}"
    guided = GUIDANCE.get(configs[part].get("_class_name", ""), "guidance_scale={:g}").format(origin.guidance_scale)
    first, needed, given = '"…"', "", ""
    if origin.video is not None:
        first, needed = "image" if part == "unet" else 'image, "…"', "from diffusers.utils import load_image\n"
        given = 'image = load_image("FIRST_FRAME.png")\n'
    # Of videos the size, too: Wan's pipeline and Stable Video Diffusion's do not ask the network for it.
    own = {**(size_of(configs[part], configs["vae"]) if count else {}), **(origin.video or {})}
    length += "".join(f", {option}={value}" for option, value in own.items() if value is not None)
    call = f"{first}, {call}, {guided}{length}" if has_prompts else call
    decoder = f"\n- VAE decoder: {decoder_line(configs['vae'])}" if has_prompts else ""
    others = readers_line(read_by)
    measured = "\n".join(f"- {line}" for line in results) or "Nothing was measured on it yet."
    return f"""---
library_name: diffusers
pipeline_tag: {task}
{base}tags: [slimstep, pruning, distillation]
---
# A student of {teacher}

- {name}: {network_line(part, configs[part], removed)}{decoder}
- Sampling: {origin.steps} steps{guidance}

```python
from diffusers import DiffusionPipeline
{needed}pipeline = DiffusionPipeline.from_pretrained("THIS_FOLDER"{options})
{given}{what} = pipeline({call}).{output}[0]
```
Nothing but diffusers has to be installed.{trust}{others}

## Measured

{measured}
"""


def size_of(config: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, int]:
    """Height and width in pixels of the videos that a network of this configuration draws."""
    size = config["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    pixels = vae.get("scale_factor_spatial") or 2 ** (len(vae["block_out_channels"]) - 1)
    return {"height": height * pixels, "width": width * pixels}


def readers_line(read_by: Mapping[str, Reading]) -> str:
    """What other programs make of the network's file."""
    said = [
        f"{program} {'reads' if reading.reads else 'does not read'} it ({reading.why})"
        for program, reading in read_by.items() if program != "diffusers"
    ]  # fmt: skip
    return f" Other programs, by their source code: {'; '.join(said)}." if said else ""


def network_line(part: str, config: Mapping[str, Any], removed: Sequence[str] = ()) -> str:
    """What was removed, copied and changed otherwise; where that is diffusers' own class, its configuration says which
    layers are left."""
    architecture = as_architecture(config.get("depths") or {})
    if removed and not architecture:
        return f"of diffusers' own class, without {', '.join(f'`{block}`' for block in removed)} of the full model."
    removed = [f"`{block}`" for block, spec in architecture.items() if spec.repeats == 0]
    copied = [f"`{block}` (runs {spec.repeats} times)" for block, spec in architecture.items() if spec.repeats > 1]
    narrowed = [f"`{block}` ({widths_text(spec.widths)})" for block, spec in architecture.items() if spec.widths]
    quantized = [f"`{block}` (linear layers in {spec.dtype})" for block, spec in architecture.items() if spec.dtype]
    merging = [f"`{block}` ({spec.merge:.0%} of its tokens)" for block, spec in architecture.items() if spec.merge]
    if not architecture:
        return f"of diffusers' own class; `{part}/config.json` says its layers."
    without = f"without {', '.join(removed)}" if removed else ""
    changed = {"narrowed": narrowed, "quantized": quantized, "merging": merging, "copied": copied}
    others = (f"{how}: {', '.join(of)}" for how, of in changed.items() if of)
    return "; ".join(filter(None, (without, *others))) + "."


def widths_text(widths: Mapping[str, float]) -> str:
    """The parts of a block that are narrower than the teacher's."""
    return ", ".join(f"{part} at {share:.0%}" if share else f"without {part}" for part, share in widths.items())


def decoder_line(config: Mapping[str, Any]) -> str:
    if "base_dim" in config:  # Wan's
        base = config["base_dim"]
        whole, widths = ([n * factor for factor in config["dim_mult"]]
                         for n in (base, config.get("decoder_base_dim") or base))  # fmt: skip
    elif "block_out_channels" in config:
        whole = list(config["block_out_channels"])
        widths = list(config.get("decoder_block_out_channels") or whole)
    else:
        return "as the teacher's."  # of another kind, of which none is pruned
    return "as the teacher's." if widths == whole else f"{widths} channels per level, where the teacher's has {whole}."
