"""Data sets: every source, the cache, splits, augmentation, and one clear line for bad input."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nas.training.data import load_data, parquet, stratified_split
from nas.training.data.cache import Images, cached
from search_spaces.common.errors import RunError, UserError


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels: list[int], names=(), column="image") -> None:
    entries = [None if b is None else {"bytes": b, "path": f"{k}.png"} for k, b in enumerate(images)]
    table = pa.table({column: pa.array(entries, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))})
    table = table.append_column("label", pa.array(labels, pa.int64()))
    if names:
        about = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_folder(root: Path, rng: np.random.Generator, classes=("cat", "dog"), count=6, shape=(8, 8, 3)) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(root / name / f"{k}.png")
    return root


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cifar(shared_table, tmp_path_factory):
    """The first 400 training and 100 test images of the shared CIFAR-10, as Parquet with the column `img`."""
    root = tmp_path_factory.mktemp("cifar") / "cifar10"
    for part, count in (("train", 400), ("test", 100)):
        rows = pq.ParquetFile(shared_table(f"cifar10/{part}.parquet")).iter_batches(count)
        table = pa.Table.from_batches([next(rows)])
        root.mkdir(exist_ok=True)
        pq.write_table(table.rename_columns(["img", "label"]), root / f"{part}-00000-of-00001.parquet")
    return root


def pixels_of(root: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels read without the toolkit."""
    table = pq.read_table(next(root.glob(f"{part}*.parquet")))
    images = [np.asarray(Image.open(io.BytesIO(e["bytes"])).convert("RGB")) for e in table["img"].to_pylist()]
    return np.stack(images).transpose(0, 3, 1, 2), table["label"].to_numpy()


def as_set(*splits) -> set[tuple[bytes, int]]:
    return {(i.numpy().tobytes(), int(y)) for s in splits for i, y in zip(s.images, s.labels, strict=True)}


def test_cifar10_from_parquet_is_what_the_files_hold(cifar):
    data = load_data("cifar10", root=cifar.parent, val_share=0.1)
    images, labels = pixels_of(cifar, "train")
    assert data.classes[3] == "cat"
    assert data.shape == (3, 32, 32)
    assert len(data.train) + len(data.val) == 400
    assert as_set(data.train, data.val) == {(i.tobytes(), int(y)) for i, y in zip(images, labels, strict=True)}
    assert len(as_set(data.test)) == 100
    scaled = images / 255
    assert data.mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-12)
    assert data.std == pytest.approx(scaled.std((0, 2, 3)), abs=1e-12)
    assert data.normalize(torch.from_numpy(images)).mean((0, 2, 3)).abs().max() < 1e-5


def test_pooling_is_the_average_rounded(cifar):
    data = load_data("cifar10", root=cifar, size=16)
    images, labels = pixels_of(cifar, "test")
    exact = torch.nn.functional.avg_pool2d(torch.from_numpy(images).double(), 2)
    order = np.random.default_rng(0).permutation(100)
    assert data.shape == (3, 16, 16)
    assert (data.test.labels.numpy() == labels[order]).all()
    assert (data.test.images.double() - exact[order]).abs().max() <= 0.5


def test_other_sizes_and_grey(cifar):
    data = load_data("cifar10", root=cifar, size=12, channels=1)
    assert data.shape == (1, 12, 12)
    # Averaging in any grouping keeps the mean.
    assert data.mean[0] == pytest.approx(load_data("cifar10", root=cifar, channels=1).mean[0], abs=0.003)


def test_the_cache_is_used_until_the_file_changes(cifar, tmp_path, monkeypatch):
    for file in cifar.glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = load_data("cifar10", root=tmp_path)

    def refuse(*ignored):
        raise AssertionError("decoded again")

    monkeypatch.setattr(parquet, "decode", refuse)
    again = load_data("cifar10", root=tmp_path)
    assert torch.equal(first.train.images, again.train.images)
    assert first.mean == again.mean
    os.utime(next(tmp_path.glob("test*")), (1, 1))
    with pytest.raises(AssertionError, match="decoded again"):
        load_data("cifar10", root=tmp_path)


def test_a_damaged_cache_is_made_again(cifar, tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path))
    first = load_data("cifar10", root=cifar)
    for file in (tmp_path / "cache" / "data").glob("*/images.npy"):
        file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(load_data("cifar10", root=cifar).train.images, first.train.images)
    assert not list((tmp_path / "cache" / "data").glob(".*.making"))


def test_processes_that_ask_at_once_wait_for_the_first(rng):
    made = []

    def make(folder: Path) -> Images:
        made.append(folder)
        time.sleep(0.2)
        return Images(rng.integers(0, 256, (4, 1, 2, 2), np.uint8), np.arange(4))

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: cached("waiting", {"files": "same"}, make), range(4)))
    assert len(made) == 1
    assert all((f.images == found[0].images).all() for f in found)


def test_a_cache_that_cannot_be_written(cifar, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match="could not be written"):
        load_data("cifar10", root=cifar)


def test_the_location_comes_from_the_environment(cifar, monkeypatch):
    monkeypatch.setenv("NASFORGE_DATA", str(cifar.parent))
    assert len(load_data("cifar10").test) == 100


# -- folders and Parquet of one's own ----------------------------------------------------------------------------


def test_an_image_folder(tmp_path, rng):
    write_folder(tmp_path / "train", rng, count=10)
    write_folder(tmp_path / "test", rng, count=3)
    data = load_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 6)
    for name, label in (("cat", 0), ("dog", 1)):
        found = {i.numpy().tobytes() for i, y in zip(data.test.images, data.test.labels, strict=True) if y == label}
        files = (tmp_path / "test" / name).glob("*")
        assert found == {np.asarray(Image.open(f)).transpose(2, 0, 1).tobytes() for f in files}


def test_images_of_many_shapes_need_a_size(tmp_path, rng):
    write_folder(tmp_path / "a", rng, classes=("x",), shape=(20, 30, 3))
    write_folder(tmp_path, rng, classes=("b",), shape=(24, 16))
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    with pytest.raises(UserError, match="one shape.*give a size"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), size=8).shape == (3, 8, 8)
    with pytest.raises(UserError, match="18: expected a size not above"):
        load_data(str(tmp_path), size=18)


def test_the_middle_square_is_kept(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(5):
            Image.fromarray(wide + k).save(tmp_path / name / f"{k}.png")
    assert load_data(str(tmp_path), size=2).train.images.min() >= 200


def test_broken_images_are_named_and_skipped_only_on_request(tmp_path, rng):
    write_folder(tmp_path, rng, count=10)
    (tmp_path / "cat" / "3.png").write_bytes(b"no image")
    whole = (tmp_path / "dog" / "4.png").read_bytes()
    (tmp_path / "dog" / "4.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"2 of 20 images.*3\.png.*4\.png") as found:
        load_data(str(tmp_path))
    assert "\n" not in str(found.value)
    data = load_data(str(tmp_path), skip_broken=True)
    assert len(data.train) + len(data.val) + len(data.test) == 18
    assert len(data.broken) == 2
    assert "3.png" in data.broken[0]


def test_parquet_with_class_names_and_a_missing_image(tmp_path, rng):
    images = [png(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(20)]
    write_parquet(tmp_path / "train.parquet", [*images, None], [k % 2 for k in range(21)], names=("ant", "bee"))
    with pytest.raises(UserError, match=r"1 of 21 images.*row 20 \(no bytes\)"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), skip_broken=True)
    assert data.classes == ("ant", "bee")
    assert len(data.test) == 4


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, 2, 7], ("a", "b", "c"), "'train label 7': expected labels from 0 to 2"),
        ([0, 1, -1, 1], (), "'train label -1'"),
        ([0, 1, 1, 0], ("a", "b", "c"), "\"class 'c'\": expected images of every class; 1 of 3"),
        ([0, 0, 3, 3], (), "\"class '1'\""),
        ([0, 0, 0, 0], (), "two classes or more"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, rng, labels, names, message):
    images = [png(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(4 * len(labels))]
    write_parquet(tmp_path / "train.parquet", images, labels * 4, names=names)
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path))


def test_data_without_images(tmp_path, rng):
    write_parquet(tmp_path / "a" / "train.parquet", [], [])
    with pytest.raises(UserError, match="'0 images': expected at least one that can be read$"):
        load_data(str(tmp_path / "a"))
    with pytest.raises(UserError, match="a folder with images: train.parquet, cifar-10-batches-py"):
        load_data(str(tmp_path))
    write_folder(tmp_path / "b", rng)
    (tmp_path / "b" / "eel").mkdir()
    with pytest.raises(UserError, match="class 'eel'.*1 of 3 have none$"):
        load_data(str(tmp_path / "b"))
    write_folder(tmp_path / "c" / "train", rng)
    for name in ("cat", "dog"):
        (tmp_path / "c" / "test" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="c/test'.*images in class folders"):
        load_data(str(tmp_path / "c"))
    write_folder(tmp_path / "d", rng, count=2)
    with pytest.raises(UserError, match="class 'cat' with 2 images.*3 images or more.*val and test are split off"):
        load_data(str(tmp_path / "d"))


def test_parquet_without_the_columns(tmp_path):
    pq.write_table(pa.table({"pixels": [1], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="columns `image` and `label`; it has pixels, label"):
        load_data(str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="a complete Parquet file"):
        load_data(str(tmp_path))


def test_a_damaged_parquet_file(tmp_path, rng):
    images = [png(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(20)]
    write_parquet(tmp_path / "train.parquet", images, [k % 2 for k in range(20)])
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[:200] + b"\xff" * 300 + whole[500:])
    with pytest.raises(UserError, match=r"train\.parquet|images that can be read"):
        load_data(str(tmp_path))


def test_names_that_are_none(tmp_path):
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_data("digit")
    with pytest.raises(UserError, match="a folder with cifar10.*--data-root"):
        load_data("cifar10", root=tmp_path)
    with pytest.raises(UserError, match="a share of validation"):
        load_data("digits", val_share=1.0)


# -- digits and objects ------------------------------------------------------------------------------------------


def test_digits_test_images_never_depend_on_the_seed():
    first, second = load_data("digits", seed=0), load_data("digits", seed=1)
    assert first.shape == (1, 8, 8)
    assert not first.flip
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.train.images, second.train.images)
    assert len(first.train) + len(first.val) + len(first.test) == 1797
    for part, share in ((first.test, 0.2), (first.val, 0.08)):
        counts = torch.bincount(part.labels, minlength=10)
        assert (counts - share * 179.7).abs().max() < 2
    assert load_data("digits", size=4).shape == (1, 4, 4)


def test_a_description_changes_with_the_data(rng):
    described = load_data("digits").describe()
    assert json.loads(json.dumps(described)) == described
    assert list(described["images"]) == ["train", "val", "test"]
    assert sum(described["images"].values()) == 1797
    assert described["shape"] == [1, 8, 8]
    assert described["num_classes"] == 10
    assert load_data("digits").describe() == described
    assert load_data("digits", seed=1).describe() != described
    data = load_data("digits")
    data.train.labels[700] = (data.train.labels[700] + 1) % 10
    assert data.describe()["content"] != described["content"]
    other = load_data("digits")
    other.val.images[0, 0, 3, 3] += 0.25
    assert other.describe()["content"] != described["content"]


OWN = {}


class Pairs(torch.utils.data.Dataset):
    classes = ("even", "odd")

    def __len__(self):
        return 20

    def __getitem__(self, k):
        if k >= 20:
            raise IndexError(k)
        return torch.full((3, 8, 8), float(k)) + torch.eye(8), k % 2


def arrays():
    return OWN["arrays"]


@pytest.fixture
def own(monkeypatch):
    """This module under a name that `package.module:object` can reach."""
    monkeypatch.setitem(sys.modules, "my.module", sys.modules[__name__])
    return "my.module:"


def test_a_dataset_of_ones_own(own):
    data = load_data(own + "Pairs")
    assert data.classes == ("even", "odd")
    assert data.shape == (3, 8, 8)
    assert (data.train.images[:, 0, 0, 1] % 2 == data.train.labels).all()


def test_arrays_of_ones_own(own, rng):
    images = rng.integers(0, 256, (30, 8, 6, 3), np.uint8)
    OWN["arrays"] = images, np.arange(30) % 3
    data = load_data(own + "arrays")
    assert data.shape == (3, 8, 6)
    OWN["arrays"] = {"train": (images, np.arange(30) % 3), "test": (images[:9], np.arange(9) % 3)}
    assert torch.equal(
        load_data(own + "arrays").test.images.sort(0).values,
        torch.from_numpy(images[:9].transpose(0, 3, 1, 2).copy()).sort(0).values,
    )


def pictures():
    """Pillow images in a palette, with transparency, in one bit and in colour, 12 of each of two classes."""
    rng = np.random.default_rng(0)
    for k in range(24):
        image = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8))
        yield image.convert(("P", "RGBA", "RGB")[k % 3]), np.int64(k % 2)


class Streamed(torch.utils.data.IterableDataset):
    classes = ("even", "odd")

    def __iter__(self):
        return ((torch.full((1, 4, 4), float(k)) + torch.eye(4), torch.tensor(k % 2)) for k in range(20))


def streamed_parts():
    whole = Pairs()
    return {"train": torch.utils.data.Subset(whole, range(12)), "val": Streamed3(), "test": Streamed3()}


class Streamed3(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (Pairs()[k] for k in range(12, 20))

    def __len__(self):
        return 8


def test_an_iterable_dataset_of_ones_own(own):
    data = load_data(own + "Streamed")
    assert data.classes == ("even", "odd")
    assert data.shape == (1, 4, 4)
    images, labels = torch.cat([data.train.images, data.val.images, data.test.images]), data.train.labels
    assert sorted(images[:, 0, 0, 1].tolist()) == list(range(20))
    assert (data.train.images[:, 0, 0, 1] % 2 == labels).all()


def test_parts_of_ones_own_and_the_classes_of_a_subset(own):
    data = load_data(own + "streamed_parts")
    assert data.classes == ("even", "odd")
    assert (len(data.train), len(data.val), len(data.test)) == (12, 8, 8)
    assert sorted(data.test.images[:, 0, 0, 1].tolist()) == list(range(12, 20))


def test_pictures_of_ones_own(own):
    data = load_data(own + "pictures")
    assert data.shape == (3, 6, 5)
    found = {image.numpy().tobytes() for s in (data.train, data.val, data.test) for image in s.images}
    assert found == {np.asarray(image.convert("RGB")).transpose(2, 0, 1).tobytes() for image, _ in pictures()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:0], y[:0]), "'0 train images': expected at least one image"),
        (lambda x, y: [], "'0 train images'"),
        (lambda x, y: (x[:, :0], y), "images with pixels"),
        (lambda x, y: (x, y * 10**9), "train label 2000000000.*count from 0"),
        (lambda x, y: (x, y + 1), "class '0'.*1 of 4 have none; labels count from 0"),
        (lambda x, y: (x, np.minimum(np.arange(30), 1)), "class '0' with 1 images.*3 images or more"),
        (lambda x, y: {"train": (x, y), "test": (x[:, :4], y)}, "test images of shape .*the shape of the training"),
        (lambda x, y: {"train": (x, y), "test": (x, y + 1)}, "'test label 3': expected labels from 0 to 2"),
        (lambda x, y: {"train": (x, y), "val": (x[:0], y[:0])}, "'0 val images'"),
        (lambda x, y: [(x[0], 0), (x[1, :4], 1)], "train image 1.*images of one shape"),
        (lambda x, y: [(x[0], 0), x[1]], "item 1 is of type ndarray"),
        (lambda x, y: [(x[0], y)], "train label 0 of shape"),
        (lambda x, y: (x.astype(str), y), "pixels that are real numbers"),
        (lambda x, y: (np.where(np.arange(30)[:, None, None] == 4, np.nan, x), y), "train image 4.*NaN"),
        (lambda x, y: (x, y[:-1]), "one label for each of 30 images"),
        (lambda x, y: (x, y + 0.5), "whole numbers"),
        (lambda x, y: (x[0], y), "images \\[N, C, H, W\\]"),
        (lambda x, y: (x * 0, y), "images that differ"),
        (lambda x, y: 3, "a torch Dataset"),
        (lambda x, y: {"test": (x, y)}, "a mapping with `train`"),
    ],
)
def test_objects_that_are_no_data(own, rng, change, message):
    OWN["arrays"] = change(rng.standard_normal((30, 8, 8)), np.arange(30) % 3)
    with pytest.raises(UserError, match=message):
        load_data(own + "arrays")


# -- splits -------------------------------------------------------------------------------------------------------


def test_splits_are_stratified_and_repeatable(rng):
    labels = rng.integers(0, 7, 1000)
    kept, held = stratified_split(labels, 0.3, seed=5)
    assert sorted([*kept, *held]) == list(range(1000))
    for label in range(7):
        assert (labels[held] == label).sum() == round(0.3 * (labels == label).sum())
    again = stratified_split(labels, 0.3, seed=5)
    assert (again[0] == kept).all()
    assert (stratified_split(labels, 0.3, seed=6)[1] != held).any()
    with pytest.raises(UserError, match="class 1.*two images or more"):
        stratified_split(np.array([0, 0, 1]), 0.5, seed=0)


def test_all_images_may_train():
    """Papers train on everything and report the test images: no validation image is held out then."""
    whole, split = load_data("digits", val_share=0), load_data("digits", val_share=0.1)
    assert len(whole.val) == 0
    assert len(whole.train) == len(split.train) + len(split.val)
    assert torch.equal(whole.test.labels, split.test.labels)
