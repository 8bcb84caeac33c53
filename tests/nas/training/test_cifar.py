"""The authors' files of CIFAR-10 and CIFAR-100, written byte by byte, against the arrays they were written from."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from nas.training.data import Dataset, load_data
from search_spaces.common.errors import UserError

NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES100 = [f"thing_{k:02d}" for k in range(100)]


def python2_string(data: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(data)) + data


def python2_list(values: list) -> bytes:
    items = [b"I%d\n" % v if isinstance(v, int) else python2_string(v.encode()) for v in values]
    return b"(" + b"".join(items) + b"l"


def python2_batch(images: np.ndarray, **lists: list) -> bytes:
    """A batch as Python 2 pickled it: every string, the pixels included, is a byte string."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR(I1\n"
    array += b"(I%d\nI3072\nt" % len(images) + b"cnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\n"
    array += python2_string(images.tobytes()) + b"tb"
    entries = b"".join(python2_string(name.encode()) + python2_list(values) for name, values in lists.items())
    return b"\x80\x02(" + python2_string(b"data") + array + entries + b"d."


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (600, 3, 32, 32), np.uint8)


def write(root: Path, kind: str, images: np.ndarray) -> Path:
    """500 training and 100 test images in one of the four layouts; labels count through the classes."""
    folder = root / kind
    folder.mkdir(parents=True)
    classes = 10 if "cifar-10-" in kind else 100
    labels = np.arange(600) % classes
    if classes == 10:
        parts = {f"data_batch_{k + 1}": slice(100 * k, 100 * k + 100) for k in range(5)}
        parts["test_batch"] = slice(500, 600)
    else:
        parts = {"train": slice(500), "test": slice(500, 600)}
    for name, rows in parts.items():
        pixels, chosen = images[rows].reshape(-1, 3072), labels[rows]
        if kind.endswith("py"):
            (folder / name).write_bytes(python2_batch(pixels, labels=chosen.tolist()))
        elif kind.endswith("python"):
            coarse = (chosen // 5).tolist()
            (folder / name).write_bytes(python2_batch(pixels, coarse_labels=coarse, fine_labels=chosen.tolist()))
        else:
            head = chosen[:, None] if classes == 10 else np.stack([chosen // 5, chosen], 1)
            (folder / f"{name}.bin").write_bytes(np.concatenate([head.astype(np.uint8), pixels], 1).tobytes())
    if kind.endswith("py"):
        (folder / "batches.meta").write_bytes(
            b"\x80\x02(" + python2_string(b"label_names") + python2_list(NAMES10) + b"d."
        )
    elif kind.endswith("python"):
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": NAMES100, "coarse_label_names": ["x"]}, 2))
    elif classes == 10:
        (folder / "batches.meta.txt").write_text("\n".join(NAMES10) + "\n\n")
    else:
        (folder / "fine_label_names.txt").write_text("\n".join(NAMES100) + "\n")
    return folder


KINDS = ["cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary"]


def load(kind: str, root: Path, **settings) -> Dataset:
    return load_data("cifar10" if "cifar-10-" in kind else "cifar100", root=root, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_images_that_were_written(kind, images, tmp_path):
    folder = write(tmp_path, kind, images)
    data = load(kind, tmp_path, val_share=0.2)
    classes = NAMES10 if "cifar-10-" in kind else NAMES100
    assert data.classes == tuple(classes)
    place = {image.tobytes(): k for k, image in enumerate(images)}
    for part, first, count in ((data.train, 0, 400), (data.val, 0, 100), (data.test, 500, 100)):
        found = [place[image.numpy().tobytes()] for image in part.images]
        assert part.labels.tolist() == [k % len(classes) for k in found]
        assert len(set(found)) == count
        assert min(found) >= first
    assert max(place[image.numpy().tobytes()] for image in data.train.images) < 500
    again = load_data(str(folder))  # the folder itself, without a name
    assert torch.equal(again.test.images, data.test.images)
    assert again.classes == data.classes
    small = load(kind, tmp_path, size=8, channels=1)
    assert small.shape == (1, 8, 8)
    # Grey after ITU-R 601, which Pillow documents for its conversion to L; rounded at most twice.
    grey = np.tensordot([0.299, 0.587, 0.114], images[500:].transpose(1, 0, 2, 3).astype(float), 1)
    expected = grey.reshape(100, 8, 4, 8, 4).mean((2, 4))[np.random.default_rng(0).permutation(100)]
    assert np.abs(small.test.images[:, 0].numpy() - expected).max() <= 1.01


def test_both_data_sets_in_one_folder_go_by_name(images, tmp_path):
    for kind in KINDS:
        write(tmp_path, kind, images)
    assert load_data("cifar10", root=tmp_path).num_classes == 10
    assert load_data("cifar100", root=tmp_path).num_classes == 100
    with pytest.raises(UserError, match="one data set in a folder, found cifar-10-batches-py and"):
        load_data(str(tmp_path))


def test_without_the_names(images, tmp_path):
    (write(tmp_path, "cifar-10-batches-bin", images) / "batches.meta.txt").unlink()
    (write(tmp_path, "cifar-100-binary", images) / "fine_label_names.txt").unlink()
    assert load_data("cifar10", root=tmp_path).classes == tuple(NAMES10)
    assert load_data("cifar100", root=tmp_path).classes == tuple(str(k) for k in range(100))


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        ("cifar-10-batches-bin", "data_batch_3.bin", lambda b: b[:-7], r"data_batch_3\.bin.*3073 bytes a row.*99 rows"),
        ("cifar-10-batches-bin", "data_batch_3.bin", lambda b: b[:-3073], r"data_batch_3\.bin.*100 rows as in .* 99"),
        ("cifar-10-batches-bin", "test_batch.bin", lambda b: b"", r"test_batch\.bin.*found 0 rows and 0 bytes"),
        ("cifar-10-batches-bin", "data_batch_2.bin", lambda b: None, r"data_batch_2\.bin is missing"),
        (
            "cifar-10-batches-bin",
            "data_batch_1.bin",
            lambda b: b"\x0c" + b[1:],
            "'train label 12': expected labels from",
        ),
        ("cifar-10-batches-bin", "batches.meta.txt", lambda b: b[:27], r"batches\.meta\.txt.*10 class names, found 4"),
        ("cifar-100-binary", "train.bin", lambda b: b[:-1], r"train\.bin.*3074 bytes a row"),
        ("cifar-100-python", "train", lambda b: b[: len(b) // 2], "train.*a complete pickle"),
        ("cifar-100-python", "test", lambda b: None, "the whole folder cifar-100-python; test is missing"),
        ("cifar-100-python", "train", lambda b: pickle.dumps({"data": 3}, 2), "a batch of `data` and `fine_labels`"),
        ("cifar-100-python", "train", lambda b: pickle.dumps([3], 2), "a dictionary, found list"),
        ("cifar-10-batches-py", "data_batch_2", lambda b: b"\x80\x02cos\nsystem\n(U\x04truetR.", r"os\.system"),
        ("cifar-10-batches-py", "data_batch_2", lambda b: None, "data_batch_2 is missing"),
        ("cifar-10-batches-py", "data_batch_4", lambda b: b.replace(b"labels", b"tables"), "data_batch_4.*`labels`"),
    ],
)
def test_damaged_files_are_named(images, tmp_path, kind, file, change, message):
    path = write(tmp_path, kind, images) / file
    changed = change(path.read_bytes())
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    with pytest.raises(UserError, match=message) as found:
        load(kind, tmp_path)
    assert "\n" not in str(found.value)


def test_cifar10_is_not_cifar100(images, tmp_path):
    folder = write(tmp_path, "cifar-10-batches-bin", images)
    (folder / "batches.meta.txt").write_text("\n".join(NAMES10[::-1]))
    with pytest.raises(UserError, match="the 10 classes of cifar10, found 10: truck"):
        load_data("cifar10", root=tmp_path)
    with pytest.raises(UserError, match="a folder with cifar100: train.parquet, cifar-100-python, cifar-100-binary"):
        load_data("cifar100", root=tmp_path)
