"""Prompt sets: ordered texts with a name and a hash, from a file or from the held-out captions of a data set."""

import hashlib
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from slimstep.data.sources import is_url
from slimstep.data.streams import Pairs, Stream
from slimstep.data.tables import (
    caption_column,
    caption_text,
    coco_rows,
    csv_rows,
    json_rows,
    parquet_columns,
    parquet_rows,
    read_text,
    tsv_rows,
)
from slimstep.engine.seeding import generator

log = logging.getLogger("slimstep")
MORE_PROMPTS = "data.prompt_file=FILE gives others, of which no image is needed"


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order: prompt i always meets noise i, so the order is part of what a score was measured on."""

    prompts: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"prompt set {self.name!r} holds no prompts")
        for index, prompt in enumerate(self.prompts):
            if not prompt.strip():
                raise ValueError(f"prompt {index} of set {self.name!r} is empty; give it a text or leave it out")

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.prompts)

    def __getitem__(self, index: int) -> str:
        return self.prompts[index]

    @property
    def hash(self) -> str:
        """12 hex digits of the SHA-256 of the texts in their order; the name does not count."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:12]

    @property
    def distinct(self) -> tuple[str, ...]:
        """The texts, each once, by first appearance."""
        return tuple(dict.fromkeys(self.prompts))

    def by_text(self, values_P: Tensor) -> Tensor:
        """Shape [..., P] to [..., distinct]: the mean over the noises of each text.

        Images of one text are not independent; a standard error over prompts counts texts.
        """
        place = {text: k for k, text in enumerate(self.distinct)}
        place_P = torch.tensor([place[text] for text in self.prompts])
        sums = values_P.new_zeros(*values_P.shape[:-1], len(place)).index_add_(-1, place_P, values_P)
        return sums / torch.bincount(place_P)

    def take(self, n: int, offset: int = 0, way: str = "ask for fewer or give a longer set") -> "PromptSet":
        """Prompts offset … offset + n - 1; two takes that do not overlap are disjoint halves for a rank correlation.

        Raises ValueError, with the `way` out, where there are fewer.
        """
        if n < 1 or offset < 0 or offset + n > len(self):
            raise ValueError(
                f"prompts {offset} to {offset + n} of {self.name!r} were asked for (n={n}, offset={offset}), "
                f"it holds {len(self)}: {way}"
            )
        return PromptSet(self.prompts[offset : offset + n], f"{self.name}[{offset}:{offset + n}]")

    def without(
        self, texts: Collection[str], n: int, way: str = "data.prompt_file=FILE gives others"
    ) -> "PromptSet":  # fmt: skip
        """The first n distinct prompts that are not among `texts`; where there are fewer, they are repeated with other
        noise. Raises ValueError, with the `way` out, where fewer than two are left.
        """
        left = [prompt for prompt in self.distinct if prompt not in texts][:n]
        if len(left) < 2:
            message = f"{self.name!r} has {len(left)} prompts that blocks were not ranked on, and two are needed"
            raise ValueError(f"{message}: {way}")
        if len(left) < n:
            log.warning("%d distinct prompts of %r are left to evaluate on, and repeated with other noise to make %d",
                        len(left), self.name, n)  # fmt: skip
        return PromptSet(tuple(islice(cycle(left), n)), f"{self.name}[{len(left)}]")


def read_prompts(path: str | Path, column: str | None = None, key: str = "data.prompt_column") -> PromptSet:
    """The prompts of a file in their order: .txt (one per line), .jsonl, .csv, .tsv or .parquet (one per row), or
    .json as COCO's captions come (the first caption of every image, images by their id).

    `column` names the caption column, as the configuration's `key` does; without it the file must have exactly one of
    text, caption, prompt (any case).
    Raises FileNotFoundError for a missing file; ValueError for an unknown kind, a missing column, an empty prompt (with
    its line), or a file that cannot be parsed.
    """
    path = Path(path)
    if path.suffix.lower() not in READERS:
        raise ValueError(f"prompt file {path} has the unknown kind {path.suffix!r}; use one of {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    prompts = []
    for where, prompt in READERS[path.suffix.lower()](path, column, key):
        prompts.append(caption_text(prompt, f"prompt file {path}: {where}"))
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompts")
    return PromptSet(tuple(prompts), path.stem)


def heldout_prompts(
    pairs: Pairs | Stream, n: int | None = None, name: str = "heldout", enough: Sequence[int] = ()
) -> PromptSet:
    """`n` distinct captions (all if None) of a pair data set, usually its held-out split, in a fixed shuffled order.

    Shuffled, because neighbours in a folder are often pictures of one thing. Pairs that have a method `caption(index)`
    are not asked for their images. A stream is read until there are `n`, or the sum of `enough`, captions alone.
    Raises ValueError where there are fewer than `n` distinct captions.
    """
    distinct: dict[str, None] = {}
    target = n or (sum(enough) if isinstance(pairs, Stream) else None)
    for caption in _stream_captions(pairs) if isinstance(pairs, Stream) else _shuffled_captions(pairs):
        distinct.setdefault(caption)
        if len(distinct) == target:
            break
    if n is not None and len(distinct) < n:
        held = "the stream has" if isinstance(pairs, Stream) else f"the {len(pairs)} pairs have"
        message = f"{n} prompts were asked for, {held} {len(distinct)} distinct captions"
        fewer = f"latents.prompts={len(distinct)} or fewer, or " if len(distinct) > 1 else ""
        raise ValueError(f"{message}: {fewer}latents.prompt_file=FILE with more")
    texts = list(distinct)
    if not texts:
        way = "a higher data.heldout_fraction, or data.prompt_file=FILE"
        raise ValueError(f"prompts are held-out captions, and none is held out of these data: {way}")
    if isinstance(pairs, Stream):
        texts = [texts[i] for i in torch.randperm(len(texts), generator=generator("heldout_prompts")).tolist()]
    return PromptSet(tuple(texts), name)


def _shuffled_captions(pairs: Pairs) -> Iterator[str]:
    caption = getattr(pairs, "caption", None) or (lambda index: pairs[index]["caption"])
    for index in torch.randperm(len(pairs), generator=generator("heldout_prompts")).tolist():
        yield caption(index)


def _stream_captions(stream: Stream) -> Iterator[str]:
    if is_url(stream.parts[0]):
        first = stream.parts[0].partition("?")[0]
        log.info("captions for prompts are read from %s on; data.prompt_file=FILE saves that", first)
    return (entry.caption for entry in stream.scan(images=False) if entry.caption is not None)


def _prompts_alone(path: Path, column: str | None, key: str) -> Iterator[tuple[str, str]]:
    if column is not None:
        raise ValueError(f"{key}={column}: {path} has no columns")
    if path.suffix.lower() == ".json":
        return coco_rows(path)
    lines = read_text(path).removesuffix("\n").split("\n")
    return ((f"line {number}", line) for number, line in enumerate(lines, 1))


def _jsonl_prompts(path: Path, column: str | None, key: str) -> Iterator[tuple[str, str]]:
    for where, row in json_rows(path):
        yield where, row[caption_column(row, column, f"{path}, {where}", key)]


def _csv_prompts(path: Path, column: str | None, key: str) -> Iterator[tuple[str, str]]:
    for where, row in (tsv_rows if path.suffix.lower() == ".tsv" else csv_rows)(path):
        yield where, row[caption_column(row, column, str(path), key)]


def _parquet_prompts(path: Path, column: str | None, key: str) -> Iterator[tuple[str, str]]:
    column = caption_column(parquet_columns(path), column, str(path), key)
    return ((where, row[column]) for where, row in parquet_rows(path, [column]))


READERS = {
    ".txt": _prompts_alone,
    ".jsonl": _jsonl_prompts,
    ".json": _prompts_alone,
    ".csv": _csv_prompts,
    ".tsv": _csv_prompts,
    ".parquet": _parquet_prompts,
}


def disjoint_prompts(
    prompts: PromptSet, first: int, second: int, way: str = MORE_PROMPTS
) -> tuple[PromptSet, PromptSet]:
    """`first` and `second` prompts that share no text: to rank blocks on, and to evaluate the outcome on.

    Where there are fewer distinct texts, they are cut in that proportion and each part is repeated: prompt i meets
    noise i, so a repeated prompt is drawn from other noise, and counts once in the statistics (`by_text`).
    Raises ValueError, with the `way` out, for fewer than four distinct prompts.
    """
    texts = tuple(dict.fromkeys(prompts))
    if len(texts) < 4:
        message = f"{prompts.name!r} has {len(texts)} distinct prompts, and calibration and evaluation need two each"
        raise ValueError(f"{message}: {way}")
    cut = first
    if len(texts) < first + second:
        cut = min(len(texts) - 2, max(2, round(len(texts) * first / (first + second))))
        log.warning(
            "%d distinct prompts of %r are repeated with other noise to make %d for ranking and %d for evaluation; "
            "standard errors count %d and %d", len(texts), prompts.name, first, second, cut, len(texts) - cut
        )  # fmt: skip

    def repeated(part: tuple[str, ...], n: int) -> PromptSet:
        return PromptSet(tuple(islice(cycle(part), n)), f"{prompts.name}[{len(part[:n])}]")

    return repeated(texts[:cut], first), repeated(texts[cut:], second)
