"""A cache on disk: safetensors shards with checksums, read sample by sample.

    shard-00000.safetensors    a row per sample (`sample.*`), a row per distinct caption (`caption.*`), whose is whose;
                               of text states with a mask a row per token that it has (`token.*`), caption after caption
    shard-00000.json           its checksum and what was skipped, written after it: without it there is no shard
    empty.safetensors, .json   the conditioning without a caption, for caption dropout and guidance
    index.json                 every shard's record and what made them, written last

A caption's tensors are named as in models/conditioning.py: text [L, E] and, of SDXL, pooled [P] and time_ids [6]. The
text states of an item are as long as the pipeline makes them, and those that a mask leaves out are zero: so all batches
have one shape, and no network sees a difference, for it attends to none of these tokens.

Axes: C channels, h and w latent height and width, L tokens, T tokens of all captions, E text width, P pooled width.
"""

import bisect
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from slimstep.data.config import STORAGE_DTYPES
from slimstep.engine.files import digest, json_bytes, write_json, write_tensors
from slimstep.models.conditioning import TEXT, TEXT_MASK, Conditioning, all_tokens

OPEN_SHARDS = 128
DTYPES = {name: getattr(torch, name) for name in STORAGE_DTYPES}


class CachedPairs(Dataset):
    """The finished cache in `folder`; item i: {"latents": [C, h, w], "text": [L, E], "index": int}, float32 on the CPU.

    Of SDXL it has "pooled" [P] and "time_ids" [6], too, and where captions have a mask "text_mask" [L];
    `conditioning_of` makes a batch's conditioning of such items.
    "index" is the pair's index in the data set that was cached (broken images leave gaps), of a stream a number of its
    part and position. A sample is read from its memory-mapped shard when asked for, so memory does not grow with the
    data set; workers open their own files.
    Raises FileNotFoundError where there is no finished cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "index.json").is_file():
            raise FileNotFoundError(f"{folder} is no finished cache: it has no index.json; make it with cache_pairs")
        index = json.loads((self.folder / "index.json").read_text())
        self.made_from: dict[str, str | int] = index["made_from"]
        self.truncated: int = sum(shard["truncated"] for shard in index["shards"])
        self.torn: int = sum(shard.get("torn", 0) for shard in index["shards"])
        self.broken: list[str] = [name for shard in index["shards"] for name in shard["broken"]]
        self._files = [shard["file"] for shard in index["shards"]]
        self._ends = list(accumulate(shard["samples"] for shard in index["shards"]))
        self._open: OrderedDict[str, _Shard] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        return cache_key(self.made_from)

    def distinct_captions(self) -> Iterator[str]:
        """The captions, each once per shard, without the samples."""
        for name in self._files:
            yield from _Shard(self.folder / name).captions

    @property
    def unconditional(self) -> Conditioning:
        """One row: the conditioning without a caption, as guidance uses it."""
        empty = _Shard(self.folder / "empty.safetensors").conditioning(0)
        return Conditioning({name: tensor[None] for name, tensor in empty.items()})

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        shard, row = self._at(i)
        return shard.sample(row)

    def caption(self, i: int) -> str:
        shard, row = self._at(i)
        return shard.captions[shard.caption_of[row]]

    def _at(self, i: int) -> tuple["_Shard", int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a cache of {len(self)}")
        number = bisect.bisect_right(self._ends, i)
        name = self._files[number]
        if name not in self._open:
            self._open[name] = _Shard(self.folder / name)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name], i - (self._ends[number - 1] if number else 0)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}


class _Shard:
    """One open shard; every tensor `sample.NAME`, `caption.NAME` or `token.NAME` becomes the item's entry NAME."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        names = self._file.keys()
        rows = [(*name.split("."), self._file.get_slice(name)) for name in names if "." in name]
        self._per = {kind: {name: x for per, name, x in rows if per == kind} for kind in ("sample", "caption", "token")}
        self.index: list[int] = self._file.get_tensor("index").tolist()
        self.caption_of: list[int] = self._file.get_tensor("caption_of").tolist()

    @cached_property
    def captions(self) -> list[str]:
        return json.loads(self._file.get_tensor("captions").numpy().tobytes())

    @cached_property
    def token_ends(self) -> list[int]:
        """Behind the tokens of each caption, whose first one follows the caption before; of a shard with a mask."""
        return (self._file.get_tensor(f"caption.{TEXT_MASK}") > 0).sum(1).cumsum(0).tolist()

    def sample(self, row: int) -> dict[str, Tensor | int]:
        tensors = {name: tensor[row].to(torch.float32, copy=True) for name, tensor in self._per["sample"].items()}
        return {"index": self.index[row], **tensors, **self.conditioning(self.caption_of[row])}

    def conditioning(self, caption: int) -> dict[str, Tensor]:
        """The tensors of a caption, float32."""
        tensors = {name: tensor[caption].to(torch.float32, copy=True) for name, tensor in self._per["caption"].items()}
        for name, tensor in self._per["token"].items():
            start, end = self.token_ends[caption - 1] if caption else 0, self.token_ends[caption]
            tensors[name] = all_tokens(tensor[start:end].to(torch.float32), tensors[TEXT_MASK])
        return tensors


def shard_tensors(
    samples: Mapping[str, Tensor], texts: Mapping[str, Tensor], indices: list[int], captions: list[str]
) -> dict[str, Tensor]:
    """The tensors of a shard: `samples` has a row per index, `texts` one per distinct caption, by first appearance, but
    of text states with a mask one per token that it has."""
    per = {name: "token" if name == TEXT and TEXT_MASK in texts else "caption" for name in texts}
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    return {
        **{f"sample.{name}": tensor for name, tensor in samples.items()},
        **{f"{per[name]}.{name}": tensor for name, tensor in texts.items()},
        "index": torch.tensor(indices),
        "caption_of": torch.tensor([distinct[caption] for caption in captions]),
        "captions": torch.frombuffer(bytearray(json.dumps(list(distinct)).encode()), dtype=torch.uint8),
    }


def write_shard(path: Path, tensors: dict[str, Tensor], record: dict) -> None:
    """The shard, then its record; a record never stands beside a shard that it was not written for."""
    path.with_suffix(".json").unlink(missing_ok=True)
    write_tensors(path, tensors)
    seen = {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}
    write_json(path.with_suffix(".json"), {**seen, **record})


def is_intact(path: Path, verify: bool) -> bool:
    """Whether the shard is the one its record was written for: by size, and with `verify` by checksum."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        return path.stat().st_size == record["bytes"] and (not verify or digest(path) == record["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # no shard, no record, or a damaged one
        return False


def write_index(folder: Path, made_from: dict[str, str | int], shards: list[Path]) -> None:
    records = [json.loads(path.with_suffix(".json").read_text()) for path in shards]
    index, path = {"made_from": made_from, "shards": records}, folder / "index.json"
    if not path.is_file() or path.read_bytes() != json_bytes(index):
        write_json(path, index)


def cache_key(made_from: dict[str, str | int]) -> str:
    """16 hex digits: the name of the cache's folder."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
