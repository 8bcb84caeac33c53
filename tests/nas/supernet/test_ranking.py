"""Ranking: scores are those of networks built by hand, the statistics scipy's, and what was scored is kept."""

from __future__ import annotations

import copy
import json

import numpy as np
import pyarrow
import pytest
import scipy.stats
import torch
from pyarrow import parquet
from torch import nn

import nas.supernet.trained as trained_module
from benchmarks import add_table
from benchmarks.registry import open_table
from nas.run import Run
from nas.supernet.ranking import rank, reference_values, sample_distinct
from nas.supernet.recipes import recipe, scaled
from nas.supernet.search import SearchTask, open_supernet, search_run
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
IMAGES = 460  # 230 for each half: two batches to recalibrate with, the second one smaller
COUNT = 24


def tiny(name: str = "spos", **changes):
    found = scaled(recipe(name), "tiny", flip=False)
    if found.evolution is not None:
        changes |= {"evolution_population": 2, "evolution_generations": 1, "evolution_crossover": 1}
        changes |= {"evolution_mutation": 1, "evolution_recalibration": (1, 20), "evolution_evaluation": (1, 20)}
    return found.replaced({"channels": 4, "batch_size": 32, "epochs": 1, "alpha_warmup_epochs": 0, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A search with the seeds 0 and 5."""
    out = tmp_path_factory.mktemp("ranking") / "run"
    search_run(SearchTask(tiny(), images=IMAGES), out, seeds=(0, 5))
    return out


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Architectures with numbers made up."""
    rng = np.random.default_rng(3)
    drawn = {SPACE.key(arch): arch for arch in (SPACE.sample(rng) for _ in range(2 * COUNT))}
    archs = list(drawn.values())[:COUNT]
    file = tmp_path_factory.mktemp("table") / "t.parquet"
    columns = {"arch": [SPACE.encode(a) for a in archs], "val_acc_9": rng.uniform(50, 90, COUNT).round(1)}
    columns |= {"test_acc_9": rng.uniform(50, 90, COUNT).round(1), "latency_ms": rng.uniform(1, 9, COUNT)}
    parquet.write_table(pyarrow.table(columns), file)
    add_table("ranked/made-up", "nas-bench-201", file)
    return open_table("ranked/made-up")


@pytest.fixture
def run(folder):
    for kept in (folder / "ranking").glob("*.jsonl"):
        kept.unlink()
    return Run.open(folder)


@pytest.fixture
def counted(monkeypatch):
    """The selections that were scored."""
    seen, real = [], trained_module.path_accuracy

    def count(supernet, selection, *args, **settings):
        seen.append(selection)
        return real(supernet, selection, *args, **settings)

    monkeypatch.setattr(trained_module, "path_accuracy", count)
    return seen


def ranked(run, table, **settings):
    return rank(run, table, np.random.default_rng(0), resamples=10, **settings)


def built_by_hand(supernet, arch) -> nn.Module:
    """The architecture's network, every tensor copied from its place in the supernet, running statistics forgotten."""
    network, net = supernet.network, SPACE.build(arch, in_channels=1, num_classes=10, channels=4, cells_per_stage=1)
    with torch.no_grad():
        for ours, theirs in ((net.stem, network.stem), (net.last, network.last), (net.classifier, network.classifier)):
            ours.load_state_dict(theirs.state_dict())
        for ours, theirs in zip(net.cells, network.cells, strict=True):
            if not hasattr(theirs, "edges"):
                ours.load_state_dict(theirs.state_dict())
                continue
            for edge, choice, operation in zip(ours.edges, theirs.edges, arch, strict=True):
                for tensor, value in edge.state_dict().items():
                    found = choice.candidates[operation].state_dict().get(tensor)
                    value.copy_(1.0 if found is None and tensor.endswith("weight") else 0.0 if found is None else found)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # the mean over the batches
    return net


def accuracy_by_hand(net: nn.Module, data) -> float:
    normal = [(split.images.float() - data.mean[0]) / data.std[0] for split in (data.train, data.val)]
    with torch.no_grad():
        net.train()
        for start in range(0, len(normal[0]), 200):
            net(normal[0][start : start + 200])
        net.eval()
        return 100 * float((net(normal[1]).argmax(1) == data.val.labels).double().mean())


# -- scores --------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_networks_built_by_hand(run, table):
    found = ranked(run, table, sample=8)
    assert found.seeds == (0, 5)
    assert len(set(found.archs)) == 8
    for column, seed in enumerate(found.seeds):
        _, state, data = open_supernet(run, seed)
        assert len(data.train) > 200
        for row, text in enumerate(found.archs):
            expected = accuracy_by_hand(built_by_hand(state.supernet, SPACE.decode(text)), data)
            assert found.accuracies[row, column] == pytest.approx(expected, abs=1e-9)
    assert len(np.unique(found.accuracies)) > 4


@pytest.mark.parametrize("change", [{"partial": 2}, {"edge_normalisation": True}])
def test_mixtures_and_partial_channels_are_ranked_and_stay_as_they_are(change, table, tmp_path):
    run = search_run(SearchTask(tiny("darts-v1", **change), images=80), tmp_path / "run")
    _, state, _ = open_supernet(run)
    before = copy.deepcopy(state.supernet.state_dict())
    opened = trained_module.open_trained(run)
    for row in range(4):
        opened.accuracy(table.arch(row))
    assert all(torch.equal(value, before[name]) for name, value in opened.supernet.state_dict().items())
    assert not opened.supernet.fixed
    assert len(ranked(run, table, sample=4).archs) == 4


# -- statistics ----------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_scipy(run, table):
    found = ranked(run, table)
    assert len(found.archs) == COUNT
    rows = table.rows_of([SPACE.decode(text) for text in found.archs])
    truth = table.test_values(None, "test_acc", purpose="check")[rows]
    assert found.metric == "test_acc"
    taus = []
    for column, seed in enumerate(found.seeds):
        scores, each = found.accuracies[:, column], found.each[seed]
        taus.append(scipy.stats.kendalltau(scores, truth).statistic)
        assert each.statistics["kendall_tau"] == pytest.approx(taus[-1])
        assert each.statistics["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, truth).statistic)
        best = truth[scores == scores.max()].mean()
        assert each.statistics["regret"] == pytest.approx(truth.max() - best)
        low, high = each.interval["kendall_tau"]
        assert low < each.statistics["kendall_tau"] < high
    assert found.mean.statistics["kendall_tau"] == pytest.approx(np.mean(taus))
    assert found.mean.over_seeds["kendall_tau"] == pytest.approx(np.std(taus, ddof=1))
    params = [SPACE.cost(SPACE.decode(text))["params"] for text in found.archs]
    assert found.counts["params"].statistics["kendall_tau"] == pytest.approx(
        scipy.stats.kendalltau(params, truth).statistic
    )
    again = ranked(run, table)
    assert again.archs == found.archs
    assert again.mean.interval == found.mean.interval
    other = rank(run, table, np.random.default_rng(1), resamples=10)
    assert other.mean.interval != found.mean.interval


def test_the_reference_is_stated_and_test_values_come_through_their_door(table):
    uses = len(table.test_uses)
    rows = np.arange(5)
    values, metric = reference_values(table, rows)
    assert metric == "test_acc"
    assert len(table.test_uses) == uses + 1
    assert values == pytest.approx(table.test_values(None, "test_acc", purpose="check")[rows])
    values, metric = reference_values(table, rows, "val_acc")
    assert metric == "val_acc"
    assert values == pytest.approx(table.column("val_acc")[rows])
    assert len(table.test_uses) == uses + 2
    for name in ("latency_ms", "val_accuracy"):
        with pytest.raises(UserError, match="val_acc"):
            reference_values(table, rows, name)


def test_a_sample_is_distinct_by_key_and_the_beginning_of_a_larger_one(table, monkeypatch):
    rows = sample_distinct(table, 10, np.random.default_rng(0))
    assert list(sample_distinct(table, 20, np.random.default_rng(0))[:10]) == list(rows)
    assert len(set(sample_distinct(table, None, np.random.default_rng(0)))) == COUNT
    monkeypatch.setattr(type(table.space), "key", lambda self, arch: str(arch[0]))
    same = sample_distinct(table, None, np.random.default_rng(0))
    assert sorted(table.arch(int(row))[0] for row in same) == sorted({table.arch(row)[0] for row in range(COUNT)})


# -- resume --------------------------------------------------------------------------------------------------------


def test_an_interrupted_ranking_goes_on(run, table, counted):
    whole = ranked(run, table, sample=6, seeds=[5])
    file = run.path / "ranking" / "seed-5.jsonl"
    written = file.read_text()
    assert len(counted) == 6
    file.unlink()

    def stop(done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranked(run, table, sample=6, seeds=[5], progress=stop)
    with open(file, "a") as half:
        half.write('{"arch": "|nor_co')
    counted.clear()
    again = ranked(run, table, sample=6, seeds=[5])
    assert len(counted) == 3
    assert file.read_text() == written
    assert np.array_equal(again.accuracies, whole.accuracies)
    ranked(run, table, sample=7, seeds=[5])
    assert len(counted) == 4
    ranked(run, table, sample=6, seeds=[5], images=20)  # another setting
    assert len(counted) == 10
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["images"] == 20
    assert all((5 * line["acc"] / 100 * 4) % 1 < 1e-9 for line in lines[1:])  # twentieths


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sample": COUNT + 1}, f"at most {COUNT}"),
        ({"sample": 1}, "at least two"),
        ({"seeds": [3]}, "0 or 5|0, 5"),
        ({"seeds": [0, 0]}, "differ"),
        ({"images": 0}, "images"),
        ({"metric": "test_los"}, "test_acc"),
    ],
)
def test_bad_settings_are_named(settings, named, run, table):
    with pytest.raises(UserError, match=named):
        ranked(run, table, **settings)


def test_what_cannot_be_ranked_is_named(run, table, tmp_path):
    with pytest.raises(UserError, match="this run is a training"):
        ranked(Run.create(tmp_path / "training", {"kind": "training"}), table)
    empty = Run.create(tmp_path / "empty", run.settings)
    with pytest.raises(UserError, match="checkpoint"):
        ranked(empty, table)
    macro = load_space("nas-bench-macro")
    file = tmp_path / "m.parquet"
    parquet.write_table(pyarrow.table({"arch": [macro.encode((0,) * 8)], "val_acc": [1.0]}), file)
    add_table("ranked/macro", "nas-bench-macro", file)
    with pytest.raises(UserError, match="nas-bench-201"):
        ranked(run, open_table("ranked/macro"))
    changed = {**run.settings["data"], "content": "other"}
    other = Run.open(run.path)
    other.settings["data"] = changed
    with pytest.raises(UserError, match="other than then: content"):
        ranked(other, table, sample=2)


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_ranks_and_writes_the_scores(nas, run, table, tmp_path):
    words = (
        "supernet",
        "rank",
        run.path,
        "--benchmark",
        "ranked/made-up",
        "--sample",
        5,
        "--metric",
        "val_acc",
        "--resamples",
        20,
    )
    status, out, err = nas(*words, "--json", "--out", "scores.parquet", "--device", "cpu")
    assert status == 0, err
    found = json.loads(out)
    assert found["metric"] == "val_acc"
    assert found["n"] == 5
    assert set(found["seeds"]) == {"0", "5"}
    columns = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert list(columns) == ["arch", "seed_0", "seed_5", "supernet", "val_acc"]
    tau = scipy.stats.kendalltau(columns["seed_5"], columns["val_acc"]).statistic
    assert found["seeds"]["5"]["kendall_tau"] == pytest.approx(tau)
    low, high = found["seeds"]["5"]["interval"]["kendall_tau"]
    assert low <= tau <= high
    status, out, err = nas(*words, "--search-seed", 5, "--out", "scores.csv")
    assert status == 0, err
    assert "mean of the seeds" not in out
    assert (tmp_path / "scores.csv").read_text().count("\n") == 6
    status, _, err = nas(*words, "--out", "scores.txt")
    assert status == 2
    assert ".parquet" in err
