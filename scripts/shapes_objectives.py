"""What the embedded world's networks learn from: reconstruction, contrast with hard negatives, denoising.

Axes: B batch, C channels, H and W pixels or latents, L text tokens, K hard negatives, D embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from slimstep.data.render import render_scenes
from slimstep.data.scene import Scene
from slimstep.data.shapes import COLOURS, POSITIONS, SHAPES, SIZES, ShapesPairs, Wording, caption, hard_negatives
from slimstep.engine.seeding import generator
from slimstep.models.noise_schedule import RectifiedFlow, VariancePreserving, add_noise, target_of

Batch = dict[str, Tensor | list[str]]
Metrics = dict[str, Tensor]


# What a scene shows, as classes; a scene without a second thing, a position, … has no label there.
KINDS, AXES, UNLABELLED = ("single", "count", "relation"), ("above", "left of", "inside"), -1
ATTRIBUTES = {
    "kind": KINDS, "count": (2, 3, 4), "position": tuple(POSITIONS), "relation": AXES, "background": COLOURS,
    "frame": ("", *COLOURS), "first shape": SHAPES, "first colour": COLOURS, "first size": SIZES,
    "second shape": SHAPES, "second colour": COLOURS, "second size": SIZES,
}  # fmt: skip


NUM_CLASSES = [len(names) for names in ATTRIBUTES.values()]


def attributes(scene: Scene) -> list[int]:
    """The class of every attribute of `ATTRIBUTES`; of two things the upper, left or inner one comes first."""
    _, things, count, relation, position = scene.combination()
    seen = {"kind": scene.kind, "count": count, "position": position, "relation": relation, "frame": scene.frame}
    seen["background"] = scene.background[0]
    for place, thing in zip(("first", "second"), things, strict=False):
        seen |= {f"{place} shape": thing.shape, f"{place} colour": thing.colour, f"{place} size": thing.size}
    return [
        classes.index(seen[name]) if seen.get(name) in classes else UNLABELLED for name, classes in ATTRIBUTES.items()
    ]


class Scenes(Dataset):
    """Scenes drawn as they are needed, a batch at a time, with `negatives` wrong captions each."""

    def __init__(self, pairs: ShapesPairs, negatives: int = 0) -> None:
        self.pairs, self.negatives = pairs, negatives

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> Batch:
        scenes = [self.pairs.scene(index) for index in indices]
        batch = {"image": render_scenes([scene for scene, _ in scenes]), "caption": [caption(*s) for s in scenes]}
        if self.negatives:
            drawn = zip(indices, scenes, strict=True)
            batch["attributes"] = torch.tensor([attributes(scene) for scene, _ in scenes])
            batch["negatives"] = [text for index, scene in drawn for text in self._wrong(index, *scene)]
        return batch

    def _wrong(self, index: int, scene: Scene, wording: Wording) -> list[str]:
        draw = generator("negatives", index)
        turn = int(torch.randint(1 << 16, (1,), generator=draw))
        texts = list(hard_negatives(scene, wording, turn).values())
        order = torch.randperm(len(texts), generator=draw).tolist()
        return [texts[order[k % len(order)]] for k in range(self.negatives)]


def naming_error(classes: tuple[Tensor, ...], labels_AB: Tensor) -> Tensor:
    """The mean over attributes of the cross entropy of their logits [B, classes]; unlabelled scenes count as zero."""
    return torch.stack([
        F.cross_entropy(logits, label_B, ignore_index=UNLABELLED, reduction="sum") / len(label_B)
        for logits, label_B in zip(classes, labels_AB, strict=True)
    ]).mean()  # fmt: skip


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.float() / 127.5 - 1


class AutoencoderObjective:
    """Squared error, a little absolute error for crisp edges, and a light KL term.

    Where shapes are small the absolute error holds a network at the background alone, which is its minimum.
    """

    def __init__(self, kl_weight: float, crop: int, crop_share: float, absolute_weight: float = 0.1) -> None:
        self.kl_weight, self.crop, self.crop_share = kl_weight, crop, crop_share
        self.absolute_weight = absolute_weight

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        images_BCHW = batch["image"]
        draw = {"generator": generator, "device": generator.device}
        if torch.rand((), **draw) < self.crop_share:
            top, left = torch.randint(images_BCHW.shape[-1] - self.crop + 1, (2,), **draw).tolist()
            images_BCHW = images_BCHW[..., top : top + self.crop, left : left + self.crop]
        target_BCHW = to_unit_range(images_BCHW)
        painted_BCHW, kl = model(target_BCHW, generator)
        mse, l1 = F.mse_loss(painted_BCHW, target_BCHW), F.l1_loss(painted_BCHW, target_BCHW)
        return mse + self.absolute_weight * l1 + self.kl_weight * kl, {"mse": mse, "kl": kl}


class ScorerObjective:
    """CLIP's contrast (Radford et al. 2021), where every image also meets nearly right captions.

    An image has to prefer its caption to all captions and all hard negatives of the batch; with the batch's own
    captions alone, word order stays at chance. The image's embedding has to name the scene's attributes, too: it
    learns where things are many times sooner than by contrast alone.
    """

    def __init__(self, tokenizer: CLIPTokenizer, context_length: int, negatives: int, naming_weight: float) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.negatives, self.naming_weight = negatives, naming_weight

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        texts = [*batch["caption"], *batch["negatives"]]
        ids_TL = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        ).input_ids
        image_BD, text_TD, scale, classes = model(to_unit_range(batch["image"]), ids_TL.to(batch["image"].device))
        logits_BT = scale * image_BD @ text_TD.T
        size = len(image_BD)
        target_B = torch.arange(size, device=image_BD.device)
        contrast = (F.cross_entropy(logits_BT, target_B) + F.cross_entropy(logits_BT[:, :size].T, target_B)) / 2
        naming = naming_error(classes, batch["attributes"].T)
        own_BK = logits_BT[:, size:].reshape(size, size, self.negatives)[target_B, target_B]
        accuracy = (logits_BT.diagonal()[:, None] > own_BK).float().mean()
        top1 = (logits_BT[:, :size].argmax(1) == target_B).float().mean()
        metrics = {
            "contrast": contrast,
            "naming": naming,
            "top1": top1,
            "told_from_negatives": accuracy,
            "scale": scale,
        }
        return contrast + self.naming_weight * naming, metrics


class CaptionReading(Scenes):
    """Token ids of fully worded captions and their scenes' attributes, without images."""

    def __init__(self, pairs: ShapesPairs, tokenizer: CLIPTokenizer) -> None:
        super().__init__(pairs)
        self.tokenizer = tokenizer

    def collate(self, indices: list[int]) -> Batch:
        scenes = [self.pairs.scene(index) for index in indices]
        texts = [caption(scene, Wording(background_first=wording.background_first)) for scene, wording in scenes]
        ids_BL = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"ids": ids_BL, "attributes": torch.tensor([attributes(scene) for scene, _ in scenes])}


class ReadingObjective:
    """The text encoder learns to say what is where: its last token names the upper, left or inner thing first.

    Denoising alone did not teach it: after 396k samples a caption and its reverse gave equal losses. States stay near
    those of `before`, where the encoder has been trained already.
    """

    def __init__(self, before: nn.Module | None) -> None:
        self.before = before

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        states_BLE, classes = model(batch["ids"])
        labels = batch["attributes"].T
        right = [
            (logits_BK.argmax(1) == label_B).float().sum() / (label_B != UNLABELLED).sum().clamp(min=1)
            for logits_BK, label_B in zip(classes, labels, strict=True)
        ]
        metrics = {"naming": naming_error(classes, labels), "worst": torch.stack(right).min()}
        if self.before is None:
            return metrics["naming"], metrics
        with torch.no_grad():
            before_BLE = self.before(batch["ids"]).last_hidden_state
        metrics["moved"] = F.mse_loss(states_BLE, before_BLE)
        return metrics["naming"] + metrics["moved"], metrics


class DenoisingObjective:
    """v-prediction of noisy latents; some captions are emptied, for classifier-free guidance.

    A `timestep_shift` above 1 draws noisier timesteps more often (Esser et al. 2024, equation 23): what is where is
    decided there.
    """

    def __init__(
        self, schedule: VariancePreserving, empty_ids_L: Tensor, caption_dropout: float, timestep_shift: float
    ) -> None:
        self.schedule, self.empty_ids_L, self.caption_dropout = schedule, empty_ids_L, caption_dropout
        self.timestep_shift = timestep_shift

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        x0_BCHW, ids_BL = batch["latents"], batch["ids"]
        draw = {"generator": generator, "device": x0_BCHW.device}
        u_B, shift = torch.rand(len(x0_BCHW), **draw), self.timestep_shift
        t_B = (len(self.schedule) * shift * u_B / (1 + (shift - 1) * u_B)).long().clamp(max=len(self.schedule) - 1)
        noise_BCHW = torch.randn(x0_BCHW.shape, **draw)
        dropped_B = torch.rand(len(x0_BCHW), **draw) < self.caption_dropout
        ids_BL = torch.where(dropped_B[:, None], self.empty_ids_L, ids_BL)
        level = self.schedule.alpha_sigma(t_B)
        pred_BCHW = model(add_noise(x0_BCHW, noise_BCHW, level), t_B, ids_BL)
        return F.mse_loss(pred_BCHW, target_of(x0_BCHW, noise_BCHW, level, self.schedule.prediction_type)), {}


class FlowObjective:
    """The flow of noisy latents at the schedule's training times; some captions are emptied.

    A share of the samples sees `padding` zeros behind the caption, as many as the stock pipeline appends, the others 1.
    """

    def __init__(
        self, schedule: RectifiedFlow, empty_ids_L: Tensor, caption_dropout: float, padding: int, padded_share: float
    ) -> None:
        self.schedule, self.empty_ids_L, self.caption_dropout = schedule, empty_ids_L, caption_dropout
        self.padding, self.padded_share = padding, padded_share

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        x0_BCHW, ids_BL = batch["latents"], batch["ids"][:, : len(self.empty_ids_L)]
        size, draw = len(x0_BCHW), {"generator": generator, "device": x0_BCHW.device}
        t_B = self.schedule.sample_times(size, generator)
        noise_BCHW = torch.randn(x0_BCHW.shape, **draw)
        dropped_B = torch.rand(size, **draw) < self.caption_dropout
        padding_B = torch.where(torch.rand(size, **draw) < self.padded_share, float(self.padding), 1.0)
        ids_BL = torch.where(dropped_B[:, None], self.empty_ids_L, ids_BL)
        level = self.schedule.alpha_sigma(t_B)
        pred_BCHW = model(add_noise(x0_BCHW, noise_BCHW, level), t_B, ids_BL, padding_B)
        return F.mse_loss(pred_BCHW, target_of(x0_BCHW, noise_BCHW, level, self.schedule.prediction_type)), {}
