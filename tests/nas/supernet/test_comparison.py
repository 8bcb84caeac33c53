"""Searches side by side: their figures are the table's, by hand."""

import json

import numpy as np
import pytest

from benchmarks.registry import open_table
from nas.run import Run
from nas.supernet.comparison import compare, figure, rows, write_records
from nas.supernet.recipes import recipe, scaled
from nas.supernet.search import SearchTask, search_run
from search_spaces.common.errors import UserError


@pytest.fixture
def table(nas_bench_201):
    return open_table(nas_bench_201)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("darts-v1", "gdas"):
        found = scaled(recipe(name), "tiny", flip=False).replaced({"epochs": 2, "channels": 4})
        search_run(SearchTask(found, images=80, curvature=name == "gdas"), folder / name, seeds=(0, 1))
    return folder


def test_accuracy_and_rank_are_the_tables(runs, table):
    found = compare([runs / "darts-v1", runs / "gdas"], table)
    every = table.test_values(None, found.metric, purpose="test")
    assert [o.seed for o in found.outcomes] == [0, 1, 0, 1]
    for outcome in found.outcomes:
        acc = table.test_values([table.space.decode(outcome.arch)], found.metric, purpose="test")[0]
        assert outcome.acc == acc
        assert outcome.rank == 1 + np.sum(every > acc)
        assert outcome.epochs[-1].arch == outcome.arch
        assert outcome.epochs[-1].acc == acc
        operations = [part.split("~")[0] for part in outcome.arch.replace("+", "").split("|") if part]
        kept = [name for name in operations if name != "none"]
        assert outcome.skip_share == pytest.approx(kept.count("skip_connect") / max(len(kept), 1))
    assert found.mean == pytest.approx(every.mean())
    darts, gdas = rows(found)
    assert darts["acc"] == pytest.approx(np.mean([o.acc for o in found.outcomes[:2]]))
    assert darts["acc_deviation"] == pytest.approx(abs(found.outcomes[0].acc - found.outcomes[1].acc) / 2**0.5)
    assert darts["eigenvalue"] is None
    assert np.isfinite(gdas["eigenvalue"])


def test_records_hold_every_epoch(runs, table, tmp_path):
    found = compare([runs / "darts-v1", runs / "gdas"], table)
    write_records(found, tmp_path / "records.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * (2 + 1)
    assert [line["arch"] for line in lines if line.get("found")] == [o.arch for o in found.outcomes]


def test_the_figure_has_a_line_for_each_seed_and_mean(runs, table):
    drawn = figure(compare([runs / "darts-v1", runs / "gdas"], table))
    assert [len(axes.lines) for axes in drawn.axes] == [2 * 3 + 2, 2 * 3, 2 * 3]


def test_what_does_not_belong_together_is_refused(runs, table, tmp_path):
    with pytest.raises(UserError, match="a seed of darts-v1 once"):
        compare([runs / "darts-v1"] * 2, table)
    other = scaled(recipe("darts-v1"), "tiny", flip=False).replaced({"epochs": 1, "channels": 4})
    search_run(SearchTask(other, images=80), tmp_path / "other", seeds=(5,))
    with pytest.raises(UserError, match="epochs: 1 instead of 2"):
        compare([runs / "darts-v1", tmp_path / "other"], table)
    Run.create(tmp_path / "training", {"kind": "training"})
    with pytest.raises(UserError, match="a search in a supernet; this run is a training"):
        compare([tmp_path / "training"], table)
    moved = SearchTask(other, space="darts").as_json()
    Run.create(tmp_path / "darts", {"kind": "supernet", "search": moved})
    with pytest.raises(UserError, match="searches in the space of nas-bench-201/cifar10"):
        compare([tmp_path / "darts"], table)
