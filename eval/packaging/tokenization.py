"""How a pipeline's tokenizers are called, found by watching one caption go through it.

A package carries each tokenizer.json and, in numbers, what the pipeline adds: the length that captions are filled up
to, the words it writes around them, what becomes of capitals and spaces, and whether the text encoder gets the mask of
the ids that are the caption's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import BatchEncoding

from slimstep.models.family import conditions_of_captions

PROBE, SPACED = "caption", " Two  Words "


@dataclass(frozen=True)
class Tokenization:
    """What becomes of a caption before a text encoder: `before` + caption + `after`, as `length` ids of the tokenizer
    that the pipeline calls `part`. `masked`: whether the encoder takes the mask of these ids, too. A caption before it
    `lowers` to small letters, `strips` of spaces around it, and `joins_spaces` within it to one."""

    part: str
    length: int
    before: str
    after: str
    masked: bool
    lowers: bool
    strips: bool
    joins_spaces: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the text encoder's graph calls its ids, and their mask."""
        kind = self.part.removeprefix("tokenizer")
        return (f"input_ids{kind}", *([f"attention_mask{kind}"] if self.masked else []))


class TokenizerStub:
    """Takes a tokenizer's place: it notes how it is called, and answers with `given` ids and mask, if there are any."""

    def __init__(self, part: str, tokenizer: Any):
        self.part, self.tokenizer = part, tokenizer
        self.given: tuple[Tensor, ...] = ()
        self.texts: list[str] = []
        self.length, self.masked = 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        if options.get("padding") == "longest":  # a look at what was cut, which nothing comes of
            return StubEncoding(self, {"input_ids": torch.zeros(1, 1, dtype=torch.int64)})
        if options.get("padding") != "max_length":
            raise ValueError(f"the {self.part} is asked for as many ids as a caption has, and a graph takes one number")
        encoded: Mapping[str, Tensor] = self.tokenizer(text, **{**options, "return_tensors": "pt"})
        self.texts, self.length = [text] if isinstance(text, str) else list(text), encoded["input_ids"].shape[1]
        return StubEncoding(self, dict(zip(("input_ids", "attention_mask"), self.given, strict=False)) or dict(encoded))


class StubEncoding(BatchEncoding):
    """A tokenizer's output that notes whether its mask is read."""

    def __init__(self, stub: TokenizerStub, tensors: Mapping[str, Tensor]):
        super().__init__(dict(tensors))
        object.__setattr__(self, "stub", stub)

    def __getitem__(self, item: Any) -> Any:
        if item == "attention_mask":
            self.stub.masked = True
        return super().__getitem__(item)

    def __getattr__(self, item: str) -> Any:
        return self[item] if item in ("input_ids", "attention_mask") else super().__getattr__(item)


@contextmanager
def tokenizer_stubs(pipeline: DiffusionPipeline) -> Iterator[list[TokenizerStub]]:
    """The pipeline with a stub for each of its tokenizers while the block runs."""
    own = {name: part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part}
    placed = [TokenizerStub(name, tokenizer) for name, tokenizer in own.items()]
    try:
        vars(pipeline).update({one.part: one for one in placed})  # a pipeline's own setter takes no such thing
        yield placed
    finally:
        vars(pipeline).update(own)


@torch.no_grad()
def tokenizations_of(pipeline: DiffusionPipeline) -> tuple[Tokenization, ...]:
    """How each tokenizer is called, of those that are. ValueError where more is done to a caption than is said here."""
    with tokenizer_stubs(pipeline) as placed:
        conditions_of_captions(pipeline, [PROBE])
        plain = [one.texts[:1] for one in placed]
        conditions_of_captions(pipeline, [SPACED])
        return tuple(tokenization_of(stub, *texts) for stub, texts in zip(placed, plain, strict=True) if texts)


def tokenization_of(stub: TokenizerStub, text: str) -> Tokenization:
    """text: what it was given for PROBE, before it was given SPACED."""
    before, found, after = text.partition(PROBE)
    spaced = stub.texts[0].removeprefix(before).removesuffix(after)
    ways = {SPACED: (False, False), SPACED.strip(): (True, False), " ".join(SPACED.split()): (True, True)}
    known = {shown: (lowers, *way) for kept, way in ways.items() for lowers, shown in enumerate((kept, kept.lower()))}
    if not found or spaced not in known:
        caption, given = (PROBE, text) if not found else (SPACED, stub.texts[0])
        raise ValueError(f"the {stub.part} was given {given!r} for the caption {caption!r}")
    lowers, strips, joins = known[spaced]
    return Tokenization(stub.part, stub.length, before, after, stub.masked, bool(lowers), strips, joins)
