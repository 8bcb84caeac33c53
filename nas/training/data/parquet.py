"""Parquet files of image bytes and labels, as the Hugging Face hub and its `datasets` write them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from nas.training.data.cache import Images
from nas.training.data.decoding import CHUNK, Chunk, Part, Reading, decode
from search_spaces.common.errors import UserError

PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PLACES = ("", "data", "plain_text")  # the hub's folders; another is named like the data set, as its parent
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


def find(folder: Path) -> dict[str, Part]:
    """Parts by the files' names: `train.parquet`, `test-00000-of-00001.parquet`, here or in a usual subfolder."""
    files: dict[str, list[Path]] = {}
    for file in sorted(file for place in (*PLACES, folder.name) for file in (folder / place).glob("*.parquet")):
        part = PART_NAMES.get(file.stem.lower().split("-")[0])
        if part:
            files.setdefault(part, []).append(file)
    return {part: Part("parquet", tuple(found), _classes(found[0])) for part, found in files.items()}


def read(part: Part, folder: Path, reading: Reading) -> Images:
    """The images of the files, decoded. Errors: UserError for damaged files, missing columns, labels or images."""
    return decode(_chunks(part.files), _rows(part.files), folder, reading)


def _classes(file: Path) -> tuple[str, ...]:
    """The class names that the Hugging Face writer keeps in the schema's metadata, or none."""
    import pyarrow.parquet

    with _named_errors(file):
        about = (pyarrow.parquet.read_schema(file).metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(about)["info"]["features"]
        return next((tuple(features[c]["names"]) for c in LABEL_COLUMNS if "names" in features.get(c, {})), ())
    except (KeyError, TypeError, ValueError):
        return ()


@contextlib.contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Whatever pyarrow finds wrong with a file, as a UserError."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(str(file), f"a complete Parquet file ({' '.join(str(error).split())[:120]})") from None


def _rows(files: Sequence[Path]) -> int:
    import pyarrow.parquet

    rows = 0
    for file in files:
        with _named_errors(file):
            rows += pyarrow.parquet.read_metadata(file).num_rows
    return rows


def _chunks(files: Sequence[Path]) -> Iterator[Chunk]:
    import pyarrow.parquet

    for file in files:
        with _named_errors(file):
            table = pyarrow.parquet.ParquetFile(file)
            columns = table.schema_arrow.names
        image = next((c for c in IMAGE_COLUMNS if c in columns), None)
        label = next((c for c in LABEL_COLUMNS if c in columns), None)
        if image is None or label is None:
            raise UserError(str(file), f"columns `image` and `label`; it has {', '.join(columns)}")
        row = 0
        batches = table.iter_batches(CHUNK, columns=[image, label])
        while True:
            with _named_errors(file):
                batch = next(batches, None)
            if batch is None:
                break
            entries, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
            if None in labels:
                raise UserError(f"{file.name}, row {row + labels.index(None)}", "a label")
            if not all(isinstance(entry, dict | None) for entry in entries):
                raise UserError(str(file), f"images as {{bytes, path}} in the column `{image}`")
            if not all(isinstance(value, int) for value in labels):
                raise UserError(str(file), f"whole numbers in the column `{label}`, found {labels[0]!r}")
            names = [(e or {}).get("path") or f"{file.name}, row {row + k}" for k, e in enumerate(entries)]
            yield names, [(e or {}).get("bytes") for e in entries], labels
            row += len(labels)
