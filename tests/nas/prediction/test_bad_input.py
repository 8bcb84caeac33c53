"""Bad input to `nas predict`: one line that names the value and says what was expected, and nothing half-written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from benchmarks import add_table
from predictors.registry import make_predictor
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")


@pytest.fixture(scope="module", autouse=True)
def tables(tmp_path_factory):
    """`bad/two` has two rows, `bad/same` the same everywhere, `bad/good` latencies of which some (-1) are missing."""
    rng = np.random.default_rng(0)
    drawn: dict = {}
    while len(drawn) < 30:
        arch = SPACE.sample(rng)
        drawn.setdefault(SPACE.key(arch), SPACE.encode(arch))
    columns = {"two": rng.random(2), "same": np.full(30, 70.0), "good": rng.random(30)}
    latencies = {
        "pixel3_latency_ms": np.where(np.arange(30) < 20, columns["good"], -1),
        "fpga_latency_ms": -np.ones(30),
    }
    for name, values in columns.items():
        file = tmp_path_factory.mktemp("bad") / f"{name}.parquet"
        table = {"arch": list(drawn.values())[: len(values)], "val_acc_9": values}
        if name == "good":
            table |= latencies
        pyarrow.parquet.write_table(pyarrow.table(table), file)
        add_table(f"bad/{name}", "nas-bench-201", file)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a predictor that also wants a column."""
    rng = np.random.default_rng(1)
    graphs = list(dict.fromkeys(SPACE.graph(SPACE.sample(rng)) for _ in range(20)))
    predictor = make_predictor("linear", "nas-bench-201", SPACE.vocabulary)
    folder = tmp_path_factory.mktemp("saved")
    predictor.fit(graphs, rng.random(len(graphs)), rng=rng).save(folder / "plain")
    columns = {"nwot": rng.random(len(graphs))}
    predictor.fit(graphs, rng.random(len(graphs)), extra=columns, rng=rng).save(folder / "needy")
    return folder


def refused(result) -> str:
    """The message of a command that must end with status 2, one line and no traceback."""
    status, out, err = result
    assert (status, out) == (2, ""), err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("table", "size", "expected"),
    [
        ("bad/two", "2", "a training size from 3 to 2"),
        ("bad/same", "10", "labels that differ; all 10 are the same"),
        ("bad/good", "31", "a training size from 3 to 30"),
        ("bad/godo", "10", "bad/good"),
    ],
)
def test_labels_that_teach_nothing(nas, tmp_path, command, table, size, expected):
    arguments = ("predict", command, "--benchmark", table, "--out", "made")
    if command == "train":
        message = refused(nas(*arguments, "--predictor", "linear", "--train-size", size))
        assert not (tmp_path / "made").exists()
    else:
        status, out, message = nas(*arguments, "--predictors", "linear", "--train-sizes", size, "--seeds", "1")
        assert (status, out) == (1 if table == "bad/same" else 2, "")
        assert "Traceback" not in message
    assert expected in message


def test_missing_values_of_a_table_are_left_out_and_counted(nas):
    train = ("predict", "train", "--benchmark", "bad/good", "--predictor", "linear", "--out", "made", "--target")
    status, out, err = nas(*train, "pixel3_latency_ms", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["train_size"] == 20
    assert any("10 of 30 rows lack a label or a target and are left out" in line for line in found["warnings"])
    message = refused(nas(*train, "fpga_latency_ms", "--force"))
    assert "bad/good: expected a table with fpga_latency_ms labels" in message.replace("'", "")
    assert "did you mean 'pixel3_latency_ms'" in refused(nas(*train, "pixel3_latency", "--force"))


def test_predictors_that_cannot_be_used(nas, saved, tmp_path):
    header = json.loads((saved / "plain" / "predictor.json").read_text())
    for name, change, expected in (
        ("newer", {"format": header["format"] + 1}, "a newer nasforge wrote this one"),
        ("other", {"kind": "gp-graff"}, "did you mean 'gp-graf'"),
    ):
        shutil.copytree(saved / "plain", tmp_path / name)
        (tmp_path / name / "predictor.json").write_text(json.dumps({**header, **change}))
        assert expected in refused(nas("predict", "rank", name))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "predictor.json").write_text("{")
    assert "the header that saving a predictor writes" in refused(nas("predict", "rank", "broken"))
    plain = str(saved / "plain")
    assert "this one was trained on nas-bench-201" in refused(nas("predict", "rank", plain, "--space", "darts"))
    assert "a number from 1 for --sample" in refused(nas("predict", "rank", plain, "--sample", "0"))
    assert "a number from 1 for --top" in refused(nas("predict", "rank", plain, "--top", "0"))
    assert "fitted with (nwot)" in refused(nas("predict", "rank", str(saved / "needy"), "--sample", "5"))
