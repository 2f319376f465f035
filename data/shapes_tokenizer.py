"""The tokenizer of the shapes world: a CLIP byte-pair encoding in which every word of its captions is one token.

Other text still encodes, byte by byte, so that the bundled pipeline takes captions of anything.
"""

from collections.abc import Iterable
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from slimstep.data.shapes import COLOURS, NUMBERS, POSITIONS, RELATIONS, SHAPES, SIZES

MAX_TOKENS = 32
GRAMMAR = ("a", "on", "in", "at", "the", "and", "with", "background", "frame", "circles", "crosses", "rings", "squares")
WORDS = sorted(
    {word for phrase in (*SHAPES, *COLOURS, *SIZES, *RELATIONS, *POSITIONS, *NUMBERS.values(), *GRAMMAR)
     for word in phrase.split()} | {"triangles"}
)  # fmt: skip


def _spell(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """The tokens of a word: byte-pair encoding, the earliest known merge first."""
    parts = [*word[:-1], f"{word[-1]}</w>"]
    while known := [pair for pair in pairwise(parts) if pair in merges]:
        at = [*pairwise(parts)].index(min(known, key=merges.index))
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return parts


def build_tokenizer(words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """A CLIPTokenizer of all bytes, the merges that spell `words` in their order, and CLIP's two special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(parts := _spell(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
