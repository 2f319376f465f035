"""The package job: an export as folders that need neither diffusers nor us, each tried in a new process."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimstep.engine.files import load_json, whole_folder, write_text
from slimstep.engine.planning import Plan
from slimstep.engine.run import Run
from slimstep.eval.config import Config
from slimstep.eval.inputs import (
    Teacher,
    check_trained,
    load_first_frames,
    load_teacher,
    numbered_images,
    read_prompt_set,
)
from slimstep.eval.packaging.formats import MANIFEST, RUNNER, missing_libraries, write_package
from slimstep.eval.packaging.package import BESIDE, INSIDE, package_of
from slimstep.eval.packaging.pictures import chosen
from slimstep.eval.packaging.run_package import runs_here
from slimstep.eval.packaging.sizes import Sizes, corners, sizes_from
from slimstep.eval.pages.tables import Table
from slimstep.eval.sampling import Sampler
from slimstep.models.card import origin_of
from slimstep.models.family import family_at
from slimstep.models.first_frames import with_first_frames
from slimstep.models.networks import network_of
from slimstep.models.sizes import drawing, scale_factor

log = logging.getLogger("slimstep")
MOST_DIFFERENCE = {torch.float32: 1e-2}  # of an image's pixels, from -1 to 1; rounding to 8 bits is 0.004
MOST_OF_HALVES = 0.5


def package_student(config: Config, run: Run) -> int | Plan:
    """Writes a folder for every format, or says that it would; returns exit code 0."""
    settings = config.package
    phones = [format for format in settings.formats if format not in ("onnx", "aoti")]
    if phones and family_at(config.model.name_or_path).DRAWS_VIDEOS:
        reason = "ExecuTorch has no convolution over time, and Core ML was not tried"
        raise ValueError(f"package.formats={phones}: videos are packaged as onnx or aoti: {reason}")
    for format in settings.formats:
        if missing := missing_libraries(format):
            raise ValueError(f"package.formats={format} needs {', '.join(missing)}: pip install -e '.[{format}]'")
    if settings.weights not in (INSIDE, BESIDE) and not Path(settings.weights).is_file():
        raise ValueError(f"package.weights={settings.weights} is not there: a package made with package.weights=beside "
                         "has one")  # fmt: skip
    teacher = load_teacher(config, run)
    samplers = [sampler_of(teacher, steps) for steps in steps_of(config)]
    if config.plan:
        made = {format: "made" if run.made(format) else "to do" for format in settings.formats}
        return Plan(f"run   {run.path}\n" + "\n".join(f"{name}  {state}" for name, state in made.items()))
    rows = [packaged(teacher, samplers, format) for format in settings.formats]
    print(table(rows).console)
    return 0


package_student.is_tracked = False
package_student.one_process = True


def steps_of(config: Config) -> list[int]:
    """Numbers of sampling steps: those asked for, the export's own, or those of the evaluation."""
    origin = origin_of(config.model.name_or_path)
    return list(config.package.steps) or [origin.steps if origin else config.eval.steps]


def sampler_of(teacher: Teacher, steps: int) -> Sampler:
    """What draws with so many steps; ValueError where the model was not trained at them."""
    config, scale = teacher.config, teacher.config.package.guidance_scale
    if scale is None:
        origin = origin_of(config.model.name_or_path)
        scale = origin.guidance_scale if origin else config.eval.guidance_scale
    sampler = Sampler(teacher.pipeline, steps, scale, config.eval.seed, precision=teacher.precision)
    try:
        check_trained(teacher, sampler)
    except ValueError as error:
        reason = str(error).partition(":")[0]  # behind it is what other jobs would set
        raise ValueError(f"package.steps={steps}: {reason}; leave it out") from error
    return sampler


def packaged(teacher: Teacher, samplers: Sequence[Sampler], format: str) -> dict[str, Any]:
    """A row of the table: the package of this format is written, and tried, where it is not there yet."""
    run, batch = teacher.run, teacher.config.package.batch
    # Compiled code runs on what it was made on; the others on any processor.
    device = teacher.device if format == "aoti" else torch.device("cpu")
    steps = [sampler.steps for sampler in samplers]

    def write(folder: Path) -> None:
        start = time.perf_counter()
        teacher.pipeline.to(device)
        with whole_folder(folder) as aside:
            weights = teacher.config.package.weights
            write_package(package_of(samplers[0], steps, batch, sizes_of(teacher), weights), format, aside)
            write_text(aside / "README.md", readme(teacher, format, steps[0]))
        log.info(f"{format}: written in {time.perf_counter() - start:.0f} s: {folder}")

    folder = run.sealed_folder(format, write)
    return run.json(f"{format}.json", lambda: {"format": format, **verified(teacher, samplers[0], folder)})


def sizes_of(teacher: Teacher) -> list[Sizes]:
    return [sizes_from(size) for size in teacher.config.package.sizes]


def readme(teacher: Teacher, format: str, steps: int) -> str:
    with_weights = "" if teacher.config.package.weights == INSIDE else " with safetensors"
    libraries = {"onnx": "onnxruntime", "aoti": f"torch {torch.__version__}{with_weights}", "executorch": "executorch",
                 "coreml": "coremltools, on macOS"}  # fmt: skip
    needs = f"numpy, Pillow, tokenizers and {libraries[format]}"
    return f"""# {Path(str(teacher.config.model.name_or_path)).name}, packaged

```
python {RUNNER} "a prompt" --out image.png      # {steps} sampling steps; --help has the rest
```
Needs {needs}; neither diffusers nor slimstep.
"""


def verified(teacher: Teacher, sampler: Sampler, folder: Path) -> dict[str, Any]:
    """What the package's own program draws, in new processes, beside what the pipeline draws; and the seconds of that.
    Three images of its own size, one of each corner of other sizes. ValueError where these are two images. Of a format
    that this system does not run, the bytes alone."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if not runs_here(load_json(folder / MANIFEST)["format"]):
        log.warning(f"{folder} was not run, which takes another system; its inputs' and outputs' shapes were checked")
        return {"bytes": size, "difference": None}
    row, factor = drawn_beside(teacher, sampler, folder, 3), scale_factor(sampler.pipeline)
    sides = [side * factor for side in sampler.latent_shape[-2:]]
    for height, width in corners(sizes_of(teacher)):
        if [height, width] != sides:
            with drawing(sampler.pipeline, height, width):
                other = drawn_beside(teacher, resized(sampler), folder, 1, f"{height}x{width}")
            row["difference"] = max(row["difference"], other["difference"])
    return {"bytes": size, **row}


def resized(sampler: Sampler) -> Sampler:
    """The same for the size that its pipeline draws now."""
    return Sampler(sampler.pipeline, sampler.steps, sampler.guidance_scale, sampler.seed, precision=sampler.precision)


def drawn_beside(teacher: Teacher, sampler: Sampler, folder: Path, count: int, size: str = "") -> dict[str, Any]:
    """So many images of a size, of the package's own where none is named."""
    images = teacher.run.path / "images"
    images.mkdir(parents=True, exist_ok=True)
    prompt, manifest = prompt_of(teacher), load_json(folder / MANIFEST)
    noises = len(manifest["samplers"][str(sampler.steps)]["latents"]["noises"])
    name = f"{folder.name}-{size}" if size else folder.name
    out = images / f"{name}.{'webp' if manifest['frames_per_second'] else 'png'}"
    arrays = {"noise": np.stack([unit_noises(sampler, i, noises) for i in range(count)])}
    if manifest["picture"]:
        arrays |= dict(zip(("image", "image-noise"), (x.numpy() for x in chosen(sampler, prompt)), strict=True))
    files = {what: images / f"{name}-{what}.npy" for what in (*arrays, "pixels")}
    for what, array in arrays.items():
        np.save(files[what], array)
    words = [word for what, file in files.items() for word in (f"--{what}", str(file))]
    command = [sys.executable, "-I", str(folder / RUNNER), prompt, "--out", str(out), *words,
               *(["--size", size] if size else [])]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        raise ValueError(f"{folder}: {RUNNER} ended with {done.stderr.strip().splitlines()[-1:]}")
    said, found = json.loads(done.stdout.splitlines()[-1]), np.load(files["pixels"])
    cond = sampler.conditions([prompt], [0])
    network = network_of(teacher.pipeline)
    drawn = [sampler.pixels(sampler.latents_at(network, cond, [i])).float().cpu() for i in range(len(found))]
    difference = float(np.abs(torch.cat(drawn).numpy() - found).max())
    limit = MOST_DIFFERENCE.get(network.dtype, MOST_OF_HALVES)
    if not difference <= limit:
        what = f"{prompt!r} at {size}" if size else repr(prompt)
        raise ValueError(f"{folder} draws {what} as another image than the pipeline: {difference:.2g} apart")
    for file in files.values():
        file.unlink()
    return {"difference": difference, "process_s": wall, **said}


def prompt_of(teacher: Teacher) -> str:
    """What is drawn to compare; a first frame is remembered by its pipeline."""
    if teacher.begins_with_frame:
        prompts, frames = load_first_frames(teacher.config, 1, teacher.is_conditional)
        with_first_frames(teacher.pipeline, frames)
        return prompts.prompts[0]
    return (read_prompt_set(teacher.config) if teacher.is_conditional else numbered_images(2)).prompts[0]


def unit_noises(sampler: Sampler, index: int, count: int) -> np.ndarray:
    """[count, C, H, W], or [count, C, F, H, W] of a video: the noise that it begins with, and those that a stochastic
    scheduler adds."""
    (generator,), shape = sampler.generators([index]), (1, *sampler.latent_shape)
    added = [torch.randn(shape, generator=generator) for _ in range(count - 1)]
    return torch.cat([sampler.noise(index)[None], *added]).numpy()


def table(rows: Sequence[dict[str, Any]]) -> Table:
    return Table.of({
        "package": lambda row: row["format"],
        "size": lambda row: f"{row['bytes'] / 1e6:.0f} MB",
        "pixels differ by": lambda row: f"{row['difference']:.1g}" if "draw_s" in row else "not run here",
        "loaded in": lambda row: f"{row['load_s']:.2f} s" if "draw_s" in row else "",
        "first image": lambda row: f"{row['draw_s'][0]:.2f} s" if "draw_s" in row else "",
        "another": lambda row: f"{min(row['draw_s']):.2f} s" if "draw_s" in row else "",
    }, rows)  # fmt: skip
