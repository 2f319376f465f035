"""Batches of images and captions in, a written shard out: what every way of caching shares."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimstep.data.encoding import encode_captions, encode_images, encode_nothing, is_truncated
from slimstep.data.pixels import BrokenImageError, shown
from slimstep.data.shards import shard_tensors, write_shard
from slimstep.models.conditioning import Conditioning, used_tokens


class ShardMaker:
    """Encodes samples with the frozen half of `pipeline`, which is on the device, and stores them as `dtype`.

    `encoded` counts the samples, `broken` names what was none.
    """

    def __init__(self, pipeline, device: torch.device, batch_size: int, dtype: torch.dtype) -> None:
        self.pipeline, self.device, self.batch_size, self.dtype = pipeline, device, batch_size, dtype
        self.encoded, self.broken = 0, []

    def write_empty(self, path: Path) -> None:
        nothing = self._stored([kept(encode_nothing(self.pipeline, self.device))])
        write_shard(path, shard_tensors({}, nothing, [], [""]), {})

    def write(self, path: Path, batches: Iterable[list[dict | BrokenImageError]], bar, check, record: dict) -> None:
        """One shard of the samples {"image", "caption", "index"}, or "video" in the image's place; `check(broken)` says
        when there are too many.

        `record` is what its record holds beside the counts. A shard may turn out empty.
        """
        latents, indices, captions, broken = [], [], [], []
        for batch in batches:
            sound = [item for item in batch if isinstance(item, dict)]
            torn = [str(item) for item in batch if isinstance(item, BrokenImageError)]
            broken += torn
            check(self.broken + broken)
            if sound:
                images = torch.stack(list(map(shown, sound)))
                latents.append(encode_images(self.pipeline, images, self.device))
            indices += [item["index"] for item in sound]
            captions += [item["caption"] for item in sound]
            bar.update(len(batch))
        self.broken += broken
        self.encoded += len(indices)
        distinct = list(dict.fromkeys(captions))
        texts = [kept(encode_captions(self.pipeline, some, self.device)) for some in cut(distinct, self.batch_size)]
        long = {caption for caption in distinct if is_truncated(self.pipeline, caption)}
        counts = {"samples": len(indices), "truncated": sum(c in long for c in captions), "broken": broken}
        write_shard(path, shard_tensors(self._stored(latents), self._stored(texts), indices, captions), counts | record)

    def _stored(self, encoded: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names = encoded[0] if encoded else ()
        return {name: torch.cat([part[name] for part in encoded]).cpu().to(self.dtype) for name in names}


def kept(cond: Conditioning) -> dict[str, Tensor]:
    """What a shard keeps of captions, on the CPU: of text states with a mask those that it has."""
    return used_tokens(cond.to("cpu").tensors)


def cut(sequence: Sequence, size: int) -> list[Sequence]:
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]
