"""What draws, scores, times and shows: keys of every job that evaluates."""

import math
from dataclasses import dataclass, field
from typing import Any

import slimstep.data.config
from slimstep.engine.checks import as_table, check_choice, check_minimum
from slimstep.eval.packaging.sizes import sizes_from

PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass
class DrawingConfig:
    """How all images are drawn, by networks whose weights are float32: in `precision` float32, strictly; tf32; or
    bfloat16, the UNet by autocast. null is tf32 on a GPU that has it and float32 elsewhere. Every protocol says which.
    """

    precision: str | None = None

    def __post_init__(self) -> None:
        check_choice("sampling", self, precision=(None, *PRECISIONS))


@dataclass
class SamplingConfig:
    """Images that are scored: how many prompts, and how they are drawn. `batch_size` counts images."""

    prompts: int = 64
    steps: int = 8
    guidance_scale: float = 2.5
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        check_minimum(section, self, 2, "prompts")
        check_minimum(section, self, 1, "steps", "batch_size")
        check_minimum(section, self, 0, "guidance_scale")


@dataclass
class ScoringConfig(SamplingConfig):
    """The sampling that ranks blocks. Protocol `snapfusion`: every removal, on the same fixed number of prompts;
    `screened`: the removals alone that one evaluation of each block finds cheapest, as many as save `screen_margin`
    times what a round has to save; `racing`: one evaluation of each block on `race_prompts`, and then images of those
    changes alone that may still alter the decision, a prompt at a time, until that is expected to lose at most
    `tolerance` more than the best one, or until the `race_prompts` are spent. With `recovery_steps` above 0 every
    change is scored again after so many steps of training of its neighbours alone, at batches of `batch_size` and
    `recovery_learning_rate`; these are the scores that decide."""

    protocol: str = "snapfusion"
    screen_margin: float = 2.0
    race_prompts: int = 16
    tolerance: float = 0.1
    recovery_steps: int = 0
    recovery_learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scoring", self, protocol=("snapfusion", "screened", "racing"))
        check_minimum("scoring", self, 2, "race_prompts")
        check_minimum("scoring", self, 0, "recovery_steps")
        if not 0 < self.recovery_learning_rate < math.inf:
            raise ValueError(f"scoring.recovery_learning_rate={self.recovery_learning_rate} must be above 0")
        if self.recovery_steps and self.protocol == "racing":
            each = "draws a change a prompt at a time, and its neighbours would be trained anew each time"
            way = "choose scoring.protocol=snapfusion or screened, or scoring.recovery_steps=0"
            raise ValueError(f"scoring.recovery_steps={self.recovery_steps}: scoring.protocol=racing {each}; {way}")
        if not self.tolerance > 0:
            raise ValueError(f"scoring.tolerance={self.tolerance} must be above 0: some losses are the same")
        if not self.screen_margin >= 1:
            raise ValueError(f"scoring.screen_margin={self.screen_margin} must be at least 1, or no round saves enough")


@dataclass
class EvalConfig(SamplingConfig):
    """How the outcome is evaluated; the first `pictures` images are kept: all of them where there are no more,
    and none for 0, which only the evaluation of pipelines takes."""

    pictures: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("eval", self, 0, "pictures")


@dataclass
class LatentsConfig(SamplingConfig):
    """What a decoder is trained on: `count` latents, sampled from `prompts` captions of the training images (or of
    `prompt_column` in `prompt_file`), each from several noises. Of `rounds` trainings, each of `train.steps` with its
    own optimiser and schedule, round r sees r/rounds of them; a share `real_share` is encoded images instead."""

    prompts: int = 1024
    count: int = 4096
    prompt_file: str | None = None
    prompt_column: str | None = None
    real_share: float = 0.0
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minimum("latents", self, 1, "count", "rounds")
        if not 0 <= self.real_share <= 1:
            raise ValueError(f"latents.real_share={self.real_share} must lie between 0 and 1")
        if self.prompt_column and not self.prompt_file:
            raise ValueError(f"latents.prompt_column={self.prompt_column} is of latents.prompt_file, and none is given")
        if self.rounds > self.count:
            raise ValueError(f"latents.rounds={self.rounds} is more than latents.count={self.count}")


@dataclass
class EvaluationConfig:
    """What is measured beside CLIP score: with `distribution` the distance of the scorer's features to those of
    `real_images` held-out images; and of Inception features, FID and KID, where `inception` is a file of its weights.
    `preferences` is what `metrics` was in earlier versions. With `compile`, UNet and VAE decoder are
    compiled graphs, kept in `artifacts` for the next evaluation and the other processes. `calibration_prompts` is the
    prompts.json of the run that pruned a network: the prompts by which its blocks were chosen are left out.
    Diversity is measured on the first `diversity_prompts` distinct prompts (0: not at all), each drawn with
    `diversity_seeds` seeds.
    """

    distribution: bool = True
    real_images: int = 512
    diversity_prompts: int = 0
    diversity_seeds: int = 8
    inception: str | None = None
    preferences: Any = None
    compile: bool = False
    artifacts: str = "runs/artifacts"
    calibration_prompts: str | None = None

    def __post_init__(self) -> None:
        check_minimum("evaluation", self, 2, "real_images", "diversity_seeds")
        check_minimum("evaluation", self, 0, "diversity_prompts")
        if self.diversity_prompts == 1:
            raise ValueError("evaluation.diversity_prompts=1 gives no standard error; take 2 or more, or 0 for none")
        if self.inception is not None and not self.distribution:
            raise ValueError(f"evaluation.inception={self.inception} needs evaluation.distribution=true")


@dataclass
class BenchmarkConfig:
    """How pipelines run that are timed.

    benchmark: every combination of `compile`, `attention`, `dtype`, `memory_format`, `fused_qkv`, `quantize` and
    `batches`, each beside a pipeline in `base`, the config that ratios are to (null: diffusers as it is). cumulative:
    `rows`, each a name and what changes from the last row that was kept. pipelines: `tasks`, eager and as `compile`
    says. `images` are compared with those of float32. `cold_start` measures what compiling costs, in new processes.
    """

    compile: list[str] = field(default_factory=lambda: ["eager"])
    attention: list[str] = field(default_factory=lambda: ["sdpa"])
    dtype: list[str] = field(default_factory=lambda: ["float32"])
    memory_format: list[str] = field(default_factory=lambda: ["contiguous"])
    fused_qkv: list[bool] = field(default_factory=lambda: [False])
    quantize: list[str] = field(default_factory=lambda: ["none"])
    batches: list[int] = field(default_factory=lambda: [1])
    base: Any = None
    rows: list[Any] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: ["txt2img"])
    images: int = 8
    cold_start: bool = False

    def __post_init__(self) -> None:
        check_minimum("benchmark", self, 2, "images")
        as_table("benchmark.base", self.base)  # None stays: Hydra adds nothing to an empty table
        for name in ("compile", "attention", "dtype", "memory_format", "fused_qkv", "quantize", "batches", "tasks"):
            if not getattr(self, name):
                raise ValueError(f"benchmark.{name}=[] leaves nothing to time")
        if not all(batch >= 1 for batch in self.batches):
            raise ValueError(f"benchmark.batches={list(self.batches)} must be numbers from 1 up")


@dataclass
class CurvesConfig:
    """Numbers of steps and guidance scales at which the teacher and every student are evaluated; 0 and 1 are both
    without guidance."""

    steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    guidance: list[float] = field(default_factory=lambda: [1.0, 2.5, 7.5])

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "guidance": 0}.items():
            values = getattr(self, name)
            if not values or not all(least <= value < math.inf for value in values):
                raise ValueError(f"curves.{name}={values} must be a list of numbers from {least} up")


@dataclass
class LatencyConfig:
    """How the UNet is timed; `warmup`, `iterations` and `seconds` serve whole pipelines as well.

    `batch` counts UNet rows: 2 is one guided image. `latent_size` and `text_length` 0 are the model's own. A median
    takes `iterations` calls, fewer (but three) where they would last longer than `seconds`. `table`, a latency.json
    made elsewhere, takes the place of all measuring. `cuda_graph`: whole UNets are timed as CUDA graphs (null: on a
    GPU, where they can be captured; false: launched kernel by kernel, as an eager pipeline does).
    """

    table: str = ""
    batch: int = 2
    latent_size: int = 0
    text_length: int = 0
    compile: bool = False
    cuda_graph: bool | None = None
    dtype: str = "float32"
    warmup: int = 5
    iterations: int = 40
    seconds: float = 30.0
    additive_samples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_minimum("latency", self, 1, "batch", "warmup", "iterations", "additive_samples")
        check_minimum("latency", self, 0, "latent_size", "text_length", "seconds")
        check_choice("latency", self, dtype=("float32", "float16", "bfloat16"))


@dataclass
class ExportConfig:
    """Folders of pipelines: `model` gives all but the VAE, `vae` gives that."""

    model: str = ""
    vae: str = ""


@dataclass
class PackageConfig:
    """Packages of an export: a folder for each of `formats`: onnx, aoti, executorch, coreml. `steps` are numbers of
    sampling steps, the first by default, and `guidance_scale` the scale; empty and null are the export's own. `batch`:
    most images at once, for executorch and coreml one. `sizes`: beside the model's own, in pixels, HEIGHTxWIDTH; a side
    may be a range, MIN-MAX. `weights`: inside the graphs' files, beside them, or, of aoti, another package's
    weights.safetensors, of which it uses what it can. executorch and coreml have neither choice.
    """

    formats: list[str] = field(default_factory=lambda: ["onnx", "aoti"])
    steps: list[int] = field(default_factory=list)
    guidance_scale: float | None = None
    batch: int = 1
    sizes: list[str] = field(default_factory=list)
    weights: str = "inside"

    def __post_init__(self) -> None:
        for size in self.sizes:
            sizes_from(size)
        if self.weights not in ("inside", "beside"):
            if not self.weights.endswith(".safetensors"):
                ways = "inside, beside, or the weights.safetensors of another package"
                raise ValueError(f"package.weights={self.weights} must be {ways}")
            if self.formats != ["aoti"]:
                reason = "onnxruntime reads weights from the folder of their graph alone"
                raise ValueError(f"package.weights={self.weights} is for package.formats=[aoti]: {reason}")
        if not self.formats or not set(self.formats) <= {"onnx", "aoti", "executorch", "coreml"}:
            raise ValueError(f"package.formats={list(self.formats)} must be some of onnx, aoti, executorch, coreml")
        if single := " and ".join(sorted({"executorch", "coreml"} & set(self.formats))):
            if self.batch > 1:
                way = "package.batch=1"
                raise ValueError(f"package.batch={self.batch}: {single} packages draw one image at a time: {way}")
            if self.sizes or self.weights != "inside":
                key = "sizes" if self.sizes else "weights"
                raise ValueError(f"package.{key}: {single} packages have one size, and weights inside; leave it out")
        if not all(steps >= 1 for steps in self.steps):
            raise ValueError(f"package.steps={list(self.steps)} must be numbers from 1 up")
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"package.guidance_scale={self.guidance_scale} must be at least 0")
        check_minimum("package", self, 1, "batch")


@dataclass
class PageConfig:
    """Finished runs that a page is about: an evaluation, and the benchmark of the same models, the teacher first and
    the student last. `stages` are the runs beside its own that made them."""

    evaluation: str = ""
    benchmark: str = ""
    stages: list[str] = field(default_factory=list)


@dataclass
class RatesConfig:
    """Rows a second of one process, for the hours that plan=true tells; null is measured by it."""

    forward: float | None = None
    sampling: float | None = None
    training: float | None = None
    decoding: float | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "sampling", "training", "decoding"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"rates.{name}={value} must be above 0")


@dataclass
class Config(slimstep.data.config.Config):
    """The keys of jobs that draw, score, time and show. `metrics`, {name: what makes it}, is filled by +metric=NAME."""

    sampling: DrawingConfig = field(default_factory=DrawingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    scorer: Any = None
    metrics: Any = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    curves: CurvesConfig = field(default_factory=CurvesConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    package: PackageConfig = field(default_factory=PackageConfig)
    page: PageConfig = field(default_factory=PageConfig)
    rates: RatesConfig = field(default_factory=RatesConfig)
