"""Draws an image or a video from a prompt with a package of slimstep's, without slimstep and without diffusers.

    python run_package.py "a red circle" --out image.png
    python run_package.py "a red circle" --package FOLDER --seed 3 --count 4
    python run_package.py --image first.png --out video.webp

Needs numpy, Pillow and tokenizers, and for a package of ONNX files onnxruntime, for one of AOTInductor's the torch that
it was made with, for one of ExecuTorch's executorch, for one of Core ML's macOS and coremltools. By default the package
is the folder that this file lies in.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

ANIMATED = (".webp", ".gif", ".png")
Call = Callable[[str, Mapping[str, np.ndarray]], list[np.ndarray]]  # a graph's name and its inputs → its outputs


def asked(words: list[str] | None = None) -> argparse.Namespace:
    """What a command line asks for, by default that of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="", help="what to draw; nothing for a model without prompts")
    parser.add_argument("--package", type=Path, default=Path(__file__).resolve().parent, help="its folder")
    parser.add_argument("--image", type=Path, help="what a video begins with, or a second stage makes larger: a "
                        "picture, or pixels [3, H, W] from -1 to 1 as .npy")  # fmt: skip
    parser.add_argument("--out", type=Path, help="by default image.png or video.webp; several get a number each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="images or videos")
    parser.add_argument("--steps", type=int, help="sampling steps, one of those that the package was made for")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels, one of those that the package was made for")
    parser.add_argument("--guidance", type=float, help="guidance scale; by default the model's own")
    parser.add_argument("--noise", type=Path, help="unit noise [images, noises, C, H, W] as .npy, in place of a seed's")
    parser.add_argument("--image-noise", type=Path, help="that of --image, as .npy, in place of a seed's")
    parser.add_argument("--pixels", type=Path, help="also write the pixels [images, 3, H, W] from -1 to 1 as .npy, of "
                        "videos [videos, 3, F, H, W]")  # fmt: skip
    return parser.parse_args(words)


def main() -> None:
    options = asked()
    manifest = read_manifest(options.package)
    is_video = bool(manifest["frames_per_second"])
    out = options.out or Path("video.webp" if is_video else "image.png")
    if is_video and out.suffix.lower() not in ANIMATED:
        sys.exit(f"--out {out}: a video is written as {', '.join(ANIMATED)}")
    start = time.perf_counter()
    package = Package(options.package, manifest)
    loaded = time.perf_counter()
    pixels, seconds = package.draw(options)
    if options.pixels:
        np.save(options.pixels, pixels)
    for number, image in enumerate(pixels):
        save(image, out if len(pixels) == 1 else numbered(out, number), manifest["frames_per_second"])
    print(json.dumps({"images": len(pixels), "load_s": round(loaded - start, 3), "draw_s": seconds}))


def read_manifest(folder: Path) -> dict:
    file = folder / "package.json"
    if not file.is_file():
        sys.exit(f"{file} is not there: name the folder of a package with --package")
    return json.loads(file.read_text())


class Package:
    """The graphs of a package, called by name with arrays."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        kinds = {"onnx": onnx_graphs, "aoti": aoti_graphs, "executorch": executorch_graphs, "coreml": coreml_graphs}
        self.call = kinds[manifest["format"]](folder, manifest)

    def draw(self, options: argparse.Namespace) -> tuple[np.ndarray, list[float]]:
        """Pixels [images, 3, H, W], and the seconds of every batch."""
        manifest = self.manifest
        steps = str(options.steps or manifest["steps"])
        if steps not in manifest["samplers"]:
            sys.exit(f"--steps {steps}: the package was made for {', '.join(manifest['samplers'])}")
        latents = latent_shape(options.size, manifest)
        samplers = manifest.get("samplers_of_areas", {}).get(str(latents[-2] * latents[-1]), manifest["samplers"])
        coefficients = samplers[steps]
        noise = unit_noise(options, coefficients, latents)
        scale = manifest["guidance_scale"] if options.guidance is None else options.guidance
        if scale > 1 and not (manifest["guides"] or manifest["takes_guidance"]):
            sys.exit(f"--guidance {scale:g}: the package was made without guidance")
        picture, drawn, seconds = given_picture(options, manifest), [], []
        for first in range(0, len(noise), manifest["batch"]):
            start = time.perf_counter()
            cond = self.encode(options.prompt, picture)
            drawn.append(self.batch(cond, noise[first : first + manifest["batch"]], coefficients, scale))
            seconds.append(round(time.perf_counter() - start, 4))
        return np.concatenate(drawn), seconds

    def batch(self, cond: dict, noise: np.ndarray, coefficients: dict, scale: float) -> np.ndarray:
        """Pixels of one prompt, from noise [B, noises, C, H, W]."""
        manifest, count = self.manifest, len(noise)
        # What guidance steers away from has the same picture.
        away = cond | dict(np.load(self.folder / "unconditional.npz")) if manifest["guides"] else {}
        conds = {name: np.concatenate([repeated(row, count), *([repeated(away[name], count)] if away else [])])
                 for name, row in cond.items()}  # fmt: skip
        if {"time_ids", "text_embeds"} <= conds.keys():  # SDXL's original size, crop and target size, in pixels
            height, width = (side * manifest["pixels_per_latent"] for side in noise.shape[-2:])
            conds["time_ids"][:] = height, width, 0, 0, height, width
        if manifest["takes_guidance"]:
            conds["guidance"] = np.full(count, scale, np.float32)
        terms = Terms(noise, coefficients)
        for weights, timestep in zip(coefficients["inputs"], coefficients["timesteps"], strict=True):
            x = terms.sum(weights)
            rows, t = np.concatenate([x, x]) if manifest["guides"] else x, np.array([timestep], np.float32)
            (answer,) = self.call("denoise", {"sample": rows, "timestep": t, **conds})
            prediction, variance = answer[:, : x.shape[1]], answer[:count, x.shape[1] :]
            if manifest["guides"]:
                prediction = self.guided(prediction[:count], prediction[count:], scale)
            terms.add(prediction, variance)
        latents = terms.sum(coefficients["latents"])
        if "decode" not in manifest["graphs"]:
            return latents
        scaled = latents * column(manifest["decode"]["scale"], latents) + column(manifest["decode"]["shift"], latents)
        own = scaled[:, :, manifest["latents_before"] :] if latents.ndim == 5 else scaled
        return self.call("decode", {"latent_sample": own.astype(np.float32)})[0]

    def guided(self, plain: np.ndarray, empty: np.ndarray, scale: float) -> np.ndarray:
        """Where the scale grows over the frames, `guidance_shares` says how far it has come."""
        if scale <= 1:
            return plain
        led = empty + np.float32(scale) * (plain - empty)
        if not (shares := self.manifest["guidance_shares"]):
            return led
        return plain + np.array(shares, np.float32)[:, None, None] * (led - plain)

    def encode(self, prompt: str, picture: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        inputs, names = {}, self.manifest["conditioning"]
        if not names:
            return {}
        for said in self.manifest["tokenizers"]:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(self.folder / said["file"]))
            tokenizer.enable_truncation(said["length"])
            tokenizer.enable_padding(length=said["length"], **said["padding"])
            encoded = tokenizer.encode(said["before"] + written(prompt, said) + said["after"])
            for name, values in zip(said["inputs"], (encoded.ids, encoded.attention_mask), strict=False):
                inputs[name] = np.array([values], np.int64)
        return dict(zip(names, self.call("encode", {**inputs, **picture}), strict=True))


class Terms:
    """What the sampler's sums are made of: noises, predictions and, where samples are clipped, those."""

    def __init__(self, noise: np.ndarray, coefficients: dict):
        self.noises = [noise[:, n].astype(np.float64) for n in range(noise.shape[1])]
        self.predictions: list[np.ndarray] = []
        self.samples: list[np.ndarray] = []
        self.coefficients, self.added = coefficients, 1  # noises that were added, the first among them

    def sum(self, weights: dict) -> np.ndarray:
        """In float32."""
        own = {"noises": self.noises, "predictions": self.predictions, "samples": self.samples}
        pairs = [pair for name, arrays in own.items() for pair in zip(weights[name], arrays, strict=False)]
        return sum(weight * array for weight, array in pairs).astype(np.float32)

    def add(self, prediction: np.ndarray, variance: np.ndarray) -> None:
        """The next prediction, and what follows from it."""
        turn, clip = len(self.predictions), self.coefficients["clip"]
        self.predictions.append(prediction.astype(np.float64))
        if clip:
            sample = self.sum(self.coefficients["samples"][turn])
            self.samples.append(clipped(sample, clip).astype(np.float64))
        if self.coefficients["deviations"] and (bounds := self.coefficients["deviations"][turn]):
            self.noises[self.added] = self.noises[self.added] * deviated(variance.astype(np.float64), bounds)
            self.added += 1


def clipped(sample: np.ndarray, clip: dict) -> np.ndarray:
    """Predicted images [B, …] within fixed bounds, or, with a ratio, within as many of each image's own numbers as it
    says and scaled back to 1 (dynamic thresholding: Saharia et al. 2022, section 2.3)."""
    most = clip["most"]
    if "ratio" not in clip:
        return np.clip(sample, -most, most)
    largest = np.quantile(np.abs(sample).reshape(len(sample), -1), clip["ratio"], axis=1)
    bounds = np.clip(largest, 1, most).astype(sample.dtype).reshape(-1, *[1] * (sample.ndim - 1))
    return np.clip(sample, -bounds, bounds) / bounds


def deviated(variance: np.ndarray, bounds: Sequence[float]) -> np.ndarray:
    """The deviation of a step's noise between its least and its largest, in logarithms, for a predicted variance from
    -1 to 1 (Nichol & Dhariwal 2021, equation 15)."""
    share = (variance + 1) / 2
    return (bounds[0] ** (1 - share) * bounds[1] ** share).astype(variance.dtype)


def written(prompt: str, said: dict) -> str:
    """The prompt as the pipeline would give it to this tokenizer."""
    prompt = " ".join(prompt.split()) if said["joins_spaces"] else prompt.strip() if said["strips"] else prompt
    return prompt.lower() if said["lowers"] else prompt


def given_picture(options: argparse.Namespace, manifest: dict) -> dict[str, np.ndarray]:
    """What the encoder's graph takes of --image: its pixels, and unit noise."""
    if not (said := manifest["picture"]):
        if options.image:
            sys.exit(f"--image {options.image}: the package begins with no picture")
        return {}
    if not options.image:
        sys.exit(f"the package needs {said['what']}: --image FILE")
    if not options.image.is_file():
        sys.exit(f"--image {options.image} is not there")
    noise = np.random.default_rng([options.seed, 1]).standard_normal(said["noise"], np.float32)
    if options.image_noise:
        noise = array_from(options.image_noise, "--image-noise", said["noise"])
    return {"picture": picture_pixels(options.image, said["sides"])[None], "picture_noise": noise[None]}


def picture_pixels(file: Path, sides: list[int]) -> np.ndarray:
    """[3, H, W], from -1 to 1; of another form the picture loses what is not in the middle."""
    if file.suffix == ".npy":
        return array_from(file, "--image", [3, *sides])
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (sides[1], sides[0]), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


def array_from(file: Path, option: str, shape: list[int]) -> np.ndarray:
    if not file.is_file():
        sys.exit(f"{option} {file} is not there")
    array = np.load(file)
    if list(array.shape) != list(shape):
        sys.exit(f"{option} {file} has the shape {array.shape}; it must be {tuple(shape)}")
    return array.astype(np.float32)


def latent_shape(size: str | None, manifest: dict) -> list[int]:
    """C, H and W of what is denoised for an image of this size, C, F, H and W for a video."""
    channels, *own = manifest["latents"]
    if size is None:
        return [channels, *own]
    height, by, width = size.partition("x")
    sides = [int(side) for side in (height, width)] if by and height.isdigit() and width.isdigit() else [0, 0]
    step, pixels = manifest["multiples_of"], manifest["pixels_per_latent"]
    fits = [low <= sides[0] <= high and left <= sides[1] <= right for (low, high), (left, right) in manifest["sizes"]]
    if not any(fits) or any(side % step for side in sides):
        known = ["x".join("-".join(map(str, dict.fromkeys(side))) for side in one) for one in manifest["sizes"]]
        sys.exit(f"--size {size}: the package draws HEIGHTxWIDTH of {', '.join(known)}, in multiples of {step}")
    return [channels, *own[:-2], *(side // pixels for side in sides)]


def unit_noise(options: argparse.Namespace, coefficients: dict, latents: list[int]) -> np.ndarray:
    """[images, noises, C, H, W]"""
    shape = (len(coefficients["latents"]["noises"]), *latents)
    if not options.noise:
        return np.random.default_rng(options.seed).standard_normal((options.count, *shape), np.float32)
    if not options.noise.is_file():
        sys.exit(f"--noise {options.noise} is not there")
    noise = np.load(options.noise)
    if noise.shape[1:] != shape:
        sys.exit(f"--noise {options.noise} has the shape {noise.shape}; it must be (images, {str(shape)[1:]}")
    return noise


def repeated(row: np.ndarray, count: int) -> np.ndarray:
    return np.repeat(row, count, axis=0)


def column(values: list[float], like: np.ndarray) -> np.ndarray:
    """By channel."""
    return np.array(values, np.float32).reshape(1, -1, *[1] * (like.ndim - 2))


def onnx_graphs(folder: Path, manifest: dict) -> Call:
    try:
        import onnxruntime
    except ImportError:
        sys.exit("this package needs onnxruntime: pip install onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; of the rest it has a line for every constant
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))  # 0: as many as there are cores
    files = {name: str(folder / file) for name, file in manifest["graphs"].items()}
    sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
    return lambda name, inputs: sessions[name].run(None, inputs)


def aoti_graphs(folder: Path, manifest: dict) -> Call:
    try:
        import torch
    except ImportError:
        sys.exit(f"this package needs torch {manifest['torch']}: pip install torch=={manifest['torch']}")
    if obstacle := other_machine(manifest, torch.__version__.partition("+")[0]):
        sys.exit(f"{folder}: {obstacle}")
    compile_no_probe()
    from torch._inductor.package import load_package

    graphs = {name: load_package(str(folder / file), name) for name, file in manifest["graphs"].items()}
    tensors = weights_beside(folder, manifest)
    for name, keys in manifest.get("constants", {}).items():
        constants = {constant: tensors[key] for constant, key in keys.items()}
        graphs[name].load_constants(constants, check_full_update=True, user_managed=True)

    def call(name: str, inputs: Mapping[str, np.ndarray], kept: dict = tensors) -> list[np.ndarray]:
        with torch.inference_mode():
            given = [torch.from_numpy(np.ascontiguousarray(array)).to(manifest["device"]) for array in inputs.values()]
            answer = graphs[name](*given)
        return [tensor.cpu().numpy() for tensor in (answer if isinstance(answer, (tuple, list)) else [answer])]

    return call


def weights_beside(folder: Path, manifest: dict) -> dict:
    """Tensors of a package's files by their keys, on a CPU mapped from these, so that processes share their memory;
    they live as long as the graphs that use them."""
    files = [folder / name for name in manifest.get("weights", [])]
    if missing := [str(file) for file in files if not file.is_file()]:
        sys.exit(f"{', '.join(missing)} is not there: the weights of {folder} are in it")
    if not files:
        return {}
    try:
        from safetensors import safe_open
    except ImportError:
        sys.exit("this package has its weights in a file of their own: pip install safetensors")
    keys = {key for named in manifest["constants"].values() for key in named.values()}
    tensors: dict = {}
    for file in files:
        with safe_open(str(file), framework="pt", device=manifest["device"]) as opened:
            tensors |= {key: opened.get_tensor(key) for key in keys & set(opened.keys())}
    if len(tensors) < len(keys):
        sys.exit(f"{', '.join(map(str, files))} lacks {len(keys - tensors.keys())} weights of {folder}")
    return tensors


def compile_no_probe() -> None:
    """Has inductor, imported after this, believe in the instruction sets that `other_machine` has looked for. By itself
    it compiles programs that use them when it loads a package with an empty cache, for seconds."""
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def other_machine(manifest: dict, torch_version: str) -> str:
    """Why compiled code does not run here; nothing where it does."""
    if torch_version != manifest["torch"]:
        return f"made with torch {manifest['torch']}, and this is torch {torch_version}"
    if platform.machine() != manifest["machine"]:
        return f"made for {manifest['machine']} processors, and this is {platform.machine()}"
    if missing := sorted(set(manifest["processor"]) - set(processor_features())):
        return f"made for a processor with {', '.join(missing)}, which this one lacks"
    return ""


def processor_features() -> list[str]:
    """The instruction sets that compiled code may use, by Linux' names."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    used = ("avx", "amx", "fma", "f16c", "sse", "bmi", "sve", "asimd")
    return sorted(flag for flag in flags if flag.startswith(used))


def executorch_graphs(folder: Path, manifest: dict) -> Call:
    try:
        import torch
        from executorch.runtime import Runtime
    except ImportError:
        sys.exit(f"this package needs executorch: pip install executorch=={manifest['executorch']}")
    programs = {file: Runtime.get().load_program(folder / file) for file in set(manifest["graphs"].values())}
    methods = {name: programs[file].load_method(name) for name, file in manifest["graphs"].items()}

    def call(name: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        given = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs.values()]
        return [tensor.numpy() for tensor in methods[name].execute(given)]

    return call


def coreml_graphs(folder: Path, manifest: dict) -> Call:
    if not runs_here("coreml"):
        sys.exit(f"{folder}: Core ML runs on macOS alone, and this is {platform.system()}")
    try:
        import coremltools
    except ImportError:
        sys.exit("this package needs coremltools: pip install coremltools")
    models = {name: coremltools.models.MLModel(str(folder / file)) for name, file in manifest["graphs"].items()}

    def call(name: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        # Core ML's integers have 32 bits.
        given = {key: array.astype(np.int32) if array.dtype == np.int64 else array for key, array in inputs.items()}
        answer = models[name].predict(given)
        return [answer[key] for key in manifest["outputs"][name]]

    return call


def runs_here(format: str) -> bool:
    """Whether this system runs packages of the format at all."""
    return format != "coreml" or platform.system() == "Darwin"


def save(pixels: np.ndarray, file: Path, frames_per_second: float | None) -> None:
    """An image [C, H, W], or a video [C, F, H, W] as an animation."""
    from PIL import Image

    eight_bits = (np.clip(pixels * 0.5 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    frames = eight_bits[:, None] if pixels.ndim == 3 else eight_bits
    first, *others = (Image.fromarray(frame.transpose(1, 2, 0) if len(frame) == 3 else frame[0])
                      for frame in frames.swapaxes(0, 1))  # fmt: skip
    if frames_per_second:
        first.save(file, save_all=True, append_images=others, duration=1000 / frames_per_second, loop=0)
    else:
        first.save(file)


def numbered(file: Path, number: int) -> Path:
    return file.with_stem(f"{file.stem}-{number}")


if __name__ == "__main__":
    main()
