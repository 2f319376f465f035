"""Scores of what recovers: what a change loses once its neighbours were trained for a few steps to make up for it.

What is lost at once need not rank changes as what is lost after recovery does (TinyFusion, Fang et al. 2024, arXiv
2412.01199). So after each change alone its neighbours are trained, the kept blocks that run directly before and after
it, to give the whole network's predictions at the inputs of its own sampling; everything else is frozen. Images are
then drawn and scored as ever, and the neighbours get their weights back: these alone are kept aside.

Beside it stands a cheaper score of removals, after PPCL and FastFLUX (arXiv 2506.10035), which put linear layers in the
place of blocks: what is left of the prediction's error where the block is its skip rule's output and a linear map of
that, a full matrix over channels and a shift, fitted by least squares (`LeastSquares`). It is a score alone, and no
network is made of it. The map cannot be folded into a neighbour: blocks add to what they are given, x + f(x), so that a
matrix would have to act on the x that is passed on; a shift would go into the bias before it, but transformers scale
that by the timestep, and a UNet's down path gives it to the skip connection, too. As a layer of its own a map of C
channels costs C² products a position.

Axes: B rows of a batch, N kept blocks, P prompts, S evaluations of one sampling, G 2 where these are guided (with the
prompt, and without) and 1 elsewhere, M changes, R positions, C channels. E = P·S·G, an evaluation's number.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from slimstep.data.prompts import PromptSet
from slimstep.engine.config import TrainConfig
from slimstep.engine.loop import StepBatches, learning_rate_at
from slimstep.engine.optimizers import make_optimizer, set_learning_rate
from slimstep.engine.parallel import map_batches
from slimstep.engine.seeding import generator, seed_of
from slimstep.eval.config import ScoringConfig
from slimstep.eval.metrics.compare import spearman
from slimstep.eval.metrics.metric import Metric
from slimstep.eval.sampling import Sampler
from slimstep.models.architecture import nested
from slimstep.models.conditioning import Conditioning
from slimstep.models.families.prunable import Prunable
from slimstep.prune.changed import changed
from slimstep.prune.changes import Change
from slimstep.prune.linear_maps import LeastSquares, replacing
from slimstep.prune.scores import Drawing, ScoreTable, none_if_nan

ERRORS = ("before", "linear_map", "after")


# ---- what is learned ----


@dataclass(frozen=True)
class TeacherEvaluations:
    """All evaluations of the whole network while it sampled prompts: inputs and timesteps, predictions with
    the prompt and, where the sampling is guided, without it, and where the sampling ended. All lie on the CPU: SD-1.5's
    64 prompts of 8 guided steps are 100 MB."""

    x_PSCHW: Tensor
    t_PS: Tensor
    predicted_PSGCHW: Tensor
    latents_PCHW: Tensor

    def __len__(self) -> int:
        return math.prod(self.predicted_PSGCHW.shape[:3])

    def places(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The prompts, steps and kinds of prediction of evaluations by their numbers."""
        prompts, steps, kinds = torch.unravel_index(torch.tensor(numbers), self.predicted_PSGCHW.shape[:3])
        return prompts, steps, kinds

    def number(self, prompt: int, step: int) -> int:
        """Of the evaluation with the prompt."""
        _, steps, kinds = self.predicted_PSGCHW.shape[:3]
        return (prompt * steps + step) * kinds


@torch.no_grad()
def evaluations_of_sampling(
    unet: Prunable, sampler: Sampler, prompts: PromptSet, batch_size: int, accelerator: Accelerator,
    keep: Path | None = None,
) -> TeacherEvaluations:  # fmt: skip
    """2·E evaluations: the sampling, and its predictions once more."""
    texts, shape = prompts.prompts, sampler.latent_shape
    uncond = sampler.unconditional if sampler.guides(unet) else None

    def ask(indices: list[int]) -> Tensor:
        cond = sampler.conditions(texts, indices)

        def draw(network: nn.Module, rows: list[int], _: Tensor | None) -> Tensor:
            inputs: list[tuple[Tensor, Tensor]] = []
            own = cond.rows(rows)
            end_BCHW = sampler.latents_at(network, own, [indices[row] for row in rows], inputs=inputs)
            columns = [end_BCHW]
            for x_BCHW, t in inputs:
                t_B = t.expand(len(rows))
                kinds = [own, *([own.emptied(uncond)] if uncond else [])]
                columns += [x_BCHW, *(sampler.predict(network, x_BCHW, t_B, kind) for kind in kinds), t_B[:, None]]
            return torch.cat([column.flatten(1).float() for column in columns], dim=1)

        return sampler.in_parts(draw, unet, len(indices))

    table = map_batches(ask, len(texts), batch_size, accelerator, "the whole network's predictions", keep)
    pixels, kinds = math.prod(shape), 2 if uncond else 1
    ends, steps = table[:, :pixels], table[:, pixels:].unflatten(1, (-1, (1 + kinds) * pixels + 1))
    x_PS, predicted_PS, t_PS = steps.split([pixels, kinds * pixels, 1], dim=2)
    predicted_PSGCHW = predicted_PS.unflatten(2, (kinds, *shape))
    return TeacherEvaluations(x_PS.unflatten(2, shape), t_PS[..., 0], predicted_PSGCHW, ends.unflatten(1, shape))


# ---- who learns ----


def neighbours(unet: Prunable, block: str) -> tuple[str, ...]:
    """The kept blocks that run directly before and after one: whole blocks of a whole block, and of one within another
    those that hold no others. The first and the last have one, and a block alone none."""
    holders = set(unet.parents.values())
    is_alike = (lambda other: other not in holders) if block in unet.parents else (lambda o: o not in unet.parents)
    place, order = unet.kept_blocks.index(block), list(enumerate(unet.kept_blocks))
    alike = [(n, other) for n, other in order if is_alike(other) and other != block and not nested(block, other)]
    before, after = ([other for n, other in alike if side(n)] for side in (place.__gt__, place.__lt__))
    return (*before[-1:], *after[:1])


def weights_of(unet: Prunable, blocks: Sequence[str]) -> list[nn.Parameter]:
    """Those of blocks and of all their copies."""
    modules = chain.from_iterable(unet.modules_of(path) for block in blocks for path in unet.instances(block))
    return list({id(weight): weight for module in modules for weight in module.parameters()}.values())


@contextmanager
def training_alone(network: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """While this runs gradients are those of `weights` alone, and no layer is in training mode; then all is, bit for
    bit, as it was."""
    parameters = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    before = [weight.detach().clone() for weight in weights]
    network.requires_grad_(False).eval()
    for weight in weights:
        weight.requires_grad_()
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in zip(weights, before, strict=True):
                weight.copy_(values)
                weight.grad = None
        for parameter, wanted in parameters:
            parameter.requires_grad_(wanted)
        for module, training in modes:
            module.training = training


# ---- scores ----


@dataclass(eq=False)
class LocalRecovery:
    """Draws a network after single changes, at once and after `training` of neighbours on `teacher`'s evaluations.

    Every change sees the same batches, which are functions of `seed`. Errors of predictions, in units of the
    prediction's mean square as in screening.py, are of one evaluation of every second prompt; linear maps are fitted on
    a batch of evaluations of the other prompts.
    """

    drawing: Drawing
    sampler: Sampler
    prompts: PromptSet
    teacher: TeacherEvaluations
    training: TrainConfig
    seed: int

    @property
    def unet(self) -> Prunable:
        return self.drawing.unet

    @cached_property
    def cond(self) -> Conditioning:
        return self.sampler.conditions(self.prompts.prompts, range(len(self.prompts)))

    @cached_property
    def held(self) -> list[int]:
        """The evaluations that errors are of, each prompt's at another step."""
        steps = self.teacher.x_PSCHW.shape[1]
        return [self.teacher.number(p, p // 2 % steps) for p in range(1, len(self.prompts), 2)]

    @cached_property
    def fitted(self) -> list[int]:
        """The evaluations that linear maps are fitted on."""
        order = torch.randperm(len(self.teacher), generator=generator("linear maps", self.seed)).tolist()
        prompts = self.teacher.places(order)[0].tolist()
        return [number for number, p in zip(order, prompts, strict=True) if p % 2 == 0][: self.training.batch_size]

    @cached_property
    def batches(self) -> list[list[int]]:
        """The evaluations of every step."""
        seed = seed_of(self.seed, "local recovery")
        return list(StepBatches(len(self.teacher), self.training, seed, first_step=0, rank=0, world=1))

    def __call__(self, label: str) -> Tensor:
        """[4·P + 3]: of every prompt the metric and the PSNR after the change, and the same after recovery; then the
        errors of ERRORS, nan where there is no linear map."""
        found_1 = changed(self.unet, [label], lambda _, mask_1N: self.recovered(label, mask_1N)[None])
        return found_1[0]

    def recovered(self, label: str, mask_1N: Tensor | None) -> Tensor:
        """The same, in the network as the change has it."""
        weights = weights_of(self.unet, neighbours(self.unet, Change.of(label).block))
        before_P2 = self.images(mask_1N)
        errors = [self.error(mask_1N), self.linear_error(label, mask_1N)]
        with training_alone(self.unet, weights):
            if weights:
                self.train(label, weights, mask_1N)
            after_P2 = self.images(mask_1N)
            errors.append(self.error(mask_1N))
        return torch.cat([before_P2.flatten(), after_P2.flatten(), torch.tensor(errors)])

    def images(self, mask_1N: Tensor | None) -> Tensor:
        """[P, 2]: the metric of all prompts' images, and their PSNR to the base's."""
        texts, found = self.prompts.prompts, []
        for part in torch.arange(len(texts)).split(self.drawing.shared[0]):
            own = part.tolist()
            mask_BN = None if mask_1N is None else mask_1N.expand(len(own), -1)
            images = self.sampler.images(self.unet, texts, own, block_mask_BN=mask_BN).cpu()
            found.append(self.drawing.values_of(images, own).cpu())
        return torch.cat(found)

    def errors(self, numbers: Sequence[int], mask_BN: Tensor | None) -> Tensor:
        """[B]: squared errors of predictions, in units of the prediction's mean square."""
        prompts, steps, kinds = self.teacher.places(numbers)
        cond, x_BCHW = self.cond.rows(prompts), self.teacher.x_PSCHW[prompts, steps]
        if self.teacher.predicted_PSGCHW.shape[2] > 1:
            cond = cond.where(kinds == 0, self.sampler.unconditional)
        found = self.sampler.prediction(self.unet, x_BCHW, self.teacher.t_PS[prompts, steps], cond, mask_BN).float()
        target_BCHW = self.teacher.predicted_PSGCHW[prompts, steps, kinds].to(found.device)
        return (found - target_BCHW).square().flatten(1).mean(1) / target_BCHW.square().flatten(1).mean(1)

    @torch.no_grad()
    def error(self, mask_1N: Tensor | None) -> float:
        """Their mean over the evaluations that are held for it."""
        parts = torch.tensor(self.held).split(self.training.batch_size)
        found = [self.errors(part.tolist(), expanded(mask_1N, len(part))) for part in parts]
        return torch.cat(found).mean().item()

    @torch.no_grad()
    def linear_error(self, label: str, mask_1N: Tensor | None) -> float:
        """The same with a linear map in the place of a removed block; nan for parts, and for sublayers, of which
        nothing is left that a map could take."""
        if Change.of(label).part or self.unet.kinds[label] == "sublayer":
            return math.nan
        maps: dict[tuple[str, int], LeastSquares] = {}

        def look(path: str, stream: int, x_B: Tensor) -> Tensor:
            maps.setdefault((path, stream), LeastSquares()).add(*x_B.chunk(2))
            return x_B

        is_open = torch.ones_like(mask_1N)
        for part in torch.tensor(self.fitted).split(max(1, self.training.batch_size // 2)):
            own = [*part.tolist(), *part.tolist()]  # without the block, and with it: what it is given is the same
            mask_BN = torch.cat([mask_1N.expand(len(part), -1), is_open.expand(len(part), -1)])
            with replacing(self.unet, label, look):
                self.errors(own, mask_BN)
        with replacing(self.unet, label, lambda path, stream, x_B: maps[path, stream](x_B)):
            return self.error(mask_1N)

    def train(self, label: str, weights: list[nn.Parameter], mask_1N: Tensor | None) -> None:
        """FloatingPointError, which names the change, where the loss is not finite."""
        optimizer = make_optimizer(weights, self.training)
        for step, numbers in enumerate(self.batches):
            set_learning_rate(optimizer, learning_rate_at(step, self.training))
            loss = self.errors(numbers, expanded(mask_1N, len(numbers))).mean()
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the local recovery after {label} is not finite at step {step + 1}: lower "
                    f"scoring.recovery_learning_rate={self.training.learning_rate:g}"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def expanded(mask_1N: Tensor | None, rows: int) -> Tensor | None:
    return None if mask_1N is None else mask_1N.expand(rows, -1)


@dataclass(frozen=True)
class RecoveredTable:
    """Scores of changes at once and after local recovery, errors [M, 3] of predictions (ERRORS), the blocks that were
    trained, and what it cost."""

    before: ScoreTable
    after: ScoreTable
    errors_M3: Tensor
    trained: Mapping[str, tuple[str, ...]]
    cost: Mapping[str, Any]

    def record(self, protocol: dict) -> dict:
        """That of the scores after recovery; those at once stand beside them as `before_recovery`."""
        tables = [table.record(protocol) for table in (self.before, self.after)]
        before, after = ({**table["sites"], **table.get("narrower", {})} for table in tables)
        for label, errors in zip(self.after.blocks, self.errors_M3.tolist(), strict=True):
            row = after[label]
            row["before_recovery"] = {k: before[label][k] for k in ("delta_clip", "se", "psnr", "picture_error")}
            row["prediction_error"] = dict(zip(ERRORS, map(none_if_nan, errors), strict=True))
            row["trained"] = list(self.trained[label])
        lost = [[row["delta_clip"] for row in rows.values()] for rows in (before, after)]
        agreement = spearman(*lost) if all(len(set(values)) > 1 for values in lost) else None
        return {**tables[1], "recovery": {**self.cost, "rank_agreement_with_before": agreement}}


def recovery_training(scoring: ScoringConfig) -> TrainConfig:
    """How neighbours are trained: AdamW, whose rate falls to zero along a cosine."""
    rate = {"learning_rate": scoring.recovery_learning_rate, "warmup_steps": 0, "weight_decay": 0.0}
    return TrainConfig(steps=scoring.recovery_steps, batch_size=scoring.batch_size, **rate)


def recovery_cost(
    labels: Sequence[str], prompts: int, evaluations: int, training: TrainConfig, alone: int = 0
) -> dict[str, Any]:
    """What local recovery adds to scores, in rows of the network; at most, where sublayers are blocks. evaluations:
    those of one image. alone: changes that have no neighbours."""
    steps, batch = training.steps, training.batch_size
    removals, images = sum(Change.of(label).part is None for label in labels), prompts * evaluations
    held = prompts // 2
    fitted = min(batch, (prompts - held) * evaluations)
    without = 2 * images + len(labels) * (images + 2 * held) + removals * (2 * fitted + held)
    counts = {"without_gradient": without, "with_gradient": steps * batch * (len(labels) - alone)}
    return {"steps": steps, "batch_size": batch, "learning_rate": training.learning_rate, "evaluations": counts}


def score_recovered(
    unet: Prunable, sampler: Sampler, metric: Metric, prompts: PromptSet, training: TrainConfig, seed: int,
    accelerator: Accelerator, keep: Path | None = None, blocks: Sequence[str] | None = None,
) -> RecoveredTable:  # fmt: skip
    """What the removal of every block, or the changes whose labels are `blocks`, lose at once and after local recovery.

    Under `keep` every finished change lies as a file until all are there. ValueError where the weights are not float32,
    in which alone small steps add up.
    """
    if unet.dtype != torch.float32:
        raise ValueError(f"local recovery trains float32 weights, and these are {unet.dtype}: call float() first")
    blocks = tuple(blocks or unet.kept_blocks)
    shared = training.batch_size, accelerator
    teacher = evaluations_of_sampling(unet, sampler, prompts, *shared, keep and keep / "teacher")
    drawing = Drawing(unet, sampler, metric, prompts, *shared, teacher.latents_PCHW)
    every = range(len(prompts))
    base_P = prompts.by_text(drawing.base(every, keep and keep / "base"))
    recovery = LocalRecovery(drawing, sampler, prompts, teacher, training, seed)
    score = lambda items: torch.stack([recovery(blocks[item]) for item in items])  # noqa: E731
    found = map_batches(score, len(blocks), 1, accelerator, "local recovery", keep and keep / "recovered")
    values_KMP2 = found[:, :-3].unflatten(1, (2, len(every), 2)).movedim(1, 0)
    tables = [table_of(drawing, prompts, blocks, base_P, values_MP2) for values_MP2 in values_KMP2]
    trained = {label: neighbours(unet, Change.of(label).block) for label in blocks}
    alone = sum(not own for own in trained.values())
    cost = recovery_cost(blocks, len(prompts), sampler.evaluations(unet), training, alone)
    return RecoveredTable(*tables, found[:, -3:], trained, cost)


def table_of(
    drawing: Drawing, prompts: PromptSet, blocks: tuple[str, ...], base_P: Tensor, values_MP2: Tensor
) -> ScoreTable:
    """Of all changes' metrics and PSNR, prompt by prompt."""
    every = range(len(prompts))
    lost_MP2 = torch.stack([drawing.lost(values_P2, every) for values_P2 in values_MP2])
    lost_MP, psnr_MP = (prompts.by_text(values_MP) for values_MP in lost_MP2.unbind(-1))
    return ScoreTable(blocks, base_P, lost_MP, psnr_MP, drawing.others_psnr)
