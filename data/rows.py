"""Tables read as streams: parquet files, and data sets of the hub without a download.

A part is a file, or what `datasets` calls a shard; a position is a row's number in its part.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import fsspec

from slimstep.data.images import HubPairs, image_cell, loading
from slimstep.data.sources import expand, is_url, marks, opening
from slimstep.data.streams import Entry, Stream
from slimstep.data.tables import DAMAGE, caption_text, existing_column, open_parquet
from slimstep.data.tables import caption_column as find_caption_column

ROWS_AT_ONCE = 32


@dataclass(eq=False)
class RowStream(Stream):
    """Rows with an image and a caption. A subclass gives `columns`, `rows` and `name`, which errors begin with."""

    image_column: str = "image"
    name: str = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.caption_column = find_caption_column(self.columns, self.caption_column, self.name)
        existing_column(self.columns, self.image_column, self.name, "data.image_column")

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """The names of the columns there are."""

    @abstractmethod
    def rows(self, part: int, start: int, columns: list[str]) -> Iterator[dict]:
        """The rows of a part from number `start` on, images undecoded."""

    def read(self, part: int, start: int, images: bool = True) -> Iterator[Entry]:
        """A row's key is its part's name and its own number."""
        columns = [self.image_column, self.caption_column] if images else [self.caption_column]
        for number, row in enumerate(self.rows(part, start, columns), start):
            yield self._entry(f"{self.parts[part]}/{number}", f"{self.parts[part]}, row {number}", number, row, images)

    def _entry(self, key: str, name: str, number: int, row: dict, images: bool) -> Entry:
        try:
            caption = caption_text(row[self.caption_column], f"column {self.caption_column}")
            image = image_cell(row[self.image_column]) if images else None
        except (ValueError, OSError) as error:
            return Entry(key, name, number, number + 1, flaw=str(error))
        return Entry(key, name, number, number + 1, image, caption)


class ParquetPairs(RowStream):
    """The rows of the parquet files that `source` names: files, folders, globs, URLs of fsspec, a list of these.

    The image column holds encoded bytes, or {"bytes", "path"} as `datasets` writes them. Files have the same columns.
    Raises ValueError for a source of nothing, files that are no parquet, unknown columns.
    """

    def __post_init__(self) -> None:
        self._files = expand(self.source, (".parquet",))
        self.name, self.parts = self._files[0], [file.rpartition("/")[2] for file in self._files]
        super().__post_init__()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any file's name, size or time of change, and with what is taken."""
        sha = hashlib.sha256(json.dumps([marks(self._files), self.taken]).encode())
        return f"parquet-2/{sha.hexdigest()[:16]}"

    @cached_property
    def columns(self) -> list[str]:
        with self._opened(0) as file:
            return file.schema_arrow.names

    def rows(self, part: int, start: int, columns: list[str]) -> Iterator[dict]:
        """Row groups before `start` are passed over unread."""
        with self._opened(part) as file:
            for column in columns:
                existing_column(file.schema_arrow.names, column, self.parts[part])
            try:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                ends = list(accumulate(sizes))
                groups = [group for group, end in enumerate(ends) if end > start]
                first = ends[groups[0]] - sizes[groups[0]] if groups else 0
                for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns):
                    yield from batch.slice(start - first).to_pylist() if first < start else batch.to_pylist()
                    first += len(batch)
            except (*DAMAGE, KeyError) as error:
                wrong = "cannot be read" if is_url(self._files[part]) else "is damaged"
                raise ValueError(f"{self.parts[part]} {wrong}: {str(error).splitlines()[0]}") from None

    def _opened(self, part: int):
        file = self._files[part]
        if not is_url(file):
            return open_parquet(Path(file))
        with opening(file):
            return open_parquet(Path(file), fsspec.open(file, "rb").open())


@dataclass(eq=False)
class HubStream(RowStream):
    """A data set of the Hugging Face hub, or a local folder of files, read shard by shard as it comes.

    `source` is its name, `subset` the data set's own split. `heldout_subset` is held out as a whole, in place of the
    fraction. Raises ValueError, in one line, for a name that cannot be loaded and for unknown columns.
    """

    subset: str = "train"
    heldout_subset: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        import datasets  # late: a second of imports

        name = self.source
        if self.heldout_subset:
            self.subset = self.heldout_subset if self.split == "heldout" else self.subset
            self.split = "all"
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            raise ValueError(f"data set {name} was saved whole and is read at random access: data.streaming=false")
        with loading(name, self.subset):
            self._builder = datasets.load_dataset_builder(name, self.config)
            rows = self._builder.as_streaming_dataset(split=self.subset)
            self._rows = rows if rows.features else rows._resolve_features()
        self.parts = [f"shard {number}" for number in range(self._rows.num_shards)]
        self.name = f"data set {name}, {self.subset}"
        super().__post_init__()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the data set's files, by their times or the hub's commit, and with what is taken."""
        files = self._builder.config.data_files[self.subset]
        marks = [[Path(file).name for file in files], [list(mark) for mark in files.origin_metadata]]
        sha = hashlib.sha256(json.dumps([self.name, marks, self.taken]).encode())
        return f"hub-stream-2/{sha.hexdigest()[:16]}"

    @property
    def columns(self) -> list[str]:
        return list(self._rows.features)

    def rows(self, part: int, start: int, columns: list[str]) -> Iterator[dict]:
        import datasets

        rows = self._rows.select_columns(columns)
        if self.image_column in columns:
            rows = rows.cast_column(self.image_column, datasets.Image(decode=False))
        yield from rows.shard(len(self.parts), part).skip(start)


def hub_pairs(
    name: str,
    resolution: int,
    streaming: bool = False,
    split: str = "train",
    heldout_fraction: float = 0.1,
    image_column: str = "image",
    caption_column: str | None = None,
    subset: str = "train",
    heldout_subset: str | None = None,
    config: str | None = None,
    crop: str = "center",
    max_broken: float = 0.01,
    skip_empty: bool = False,
) -> HubPairs | HubStream:
    """A data set of the hub, downloaded for random access, or `streaming`. Raises what the two raise."""
    options = {"subset": subset, "heldout_subset": heldout_subset, "config": config, "max_broken": max_broken}
    options |= {"image_column": image_column, "caption_column": caption_column, "crop": crop}
    if not streaming:
        return HubPairs(name, resolution, split, heldout_fraction, **options, skip_empty=skip_empty)
    if skip_empty:
        raise ValueError("data.skip_empty=true: a stream counts rows without one as broken: data.max_broken")
    return HubStream(name, resolution, split, heldout_fraction, **options)
