"""Early stopping and sums of training losses on curves whose ranking is known."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats

from benchmarks import add_table
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")


@pytest.fixture
def curves(tmp_path, rng, monkeypatch):
    """A function: columns -> adds `my/curves`; and 50 architectures with their final worth."""
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))
    archs = {SPACE.key(a): SPACE.encode(a) for a in (SPACE.sample(rng) for _ in range(200))}
    texts = list(archs.values())[:50]

    def add(columns):
        file = tmp_path / "curves.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"arch": texts, **columns}), file)
        add_table("my/curves", "nas-bench-201", file)

    return add, rng.random(50) * 90


def test_partial_trainings_are_ranked_against_the_target(nas, curves, rng):
    add, worth = curves
    loss = {epoch: 3 - worth / 45 + rng.normal(size=50) / epoch for epoch in (1, 2, 3, 4)}
    early = worth + 20 * rng.normal(size=50)
    add(
        {
            "val_acc_2": early, "val_acc_9": worth + rng.normal(size=50), "test_acc_9": worth,
            **{f"train_loss_{epoch}": values for epoch, values in loss.items()},
        }
    )  # fmt: skip
    status, out, _ = nas("predict", "curves", "--benchmark", "my/curves", "--window", "2", "--json")
    assert status == 0
    found = {(r["predictor"], r["epochs"]): r for r in json.loads(out)["results"]}
    assert set(found) == {("early-stop", 2), ("sotl-e", 2), ("sotl-e", 3)}  # no final value, no half window
    for key, scores in (
        (("early-stop", 2), early),
        (("sotl-e", 2), -(loss[1] + loss[2])),
        (("sotl-e", 3), -(loss[2] + loss[3])),
    ):
        assert found[key]["kendall_tau"] == pytest.approx(scipy.stats.kendalltau(scores, worth).statistic)
        assert found[key]["rows"] == 50


def test_tables_without_curves_are_refused(nas, curves):
    add, worth = curves
    add({"val_acc_9": worth})
    status, _, err = nas("predict", "curves", "--benchmark", "my/curves")
    assert status == 2
    assert "a table with learning curves" in err
    status, _, err = nas("predict", "curves", "--benchmark", "my/curves", "--window", "0")
    assert status == 2
    assert "a window of at least 1" in err


def test_what_is_better_when_smaller_is_turned_round(nas, curves, rng):
    add, worth = curves
    add({"val_loss_2": np.exp(-worth), "val_loss_9": -worth})
    status, out, _ = nas("predict", "curves", "--benchmark", "my/curves", "--json")
    assert status == 0
    (found,) = json.loads(out)["results"]
    assert found["kendall_tau"] == pytest.approx(1)
