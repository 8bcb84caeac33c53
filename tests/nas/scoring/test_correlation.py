"""Correlations with a table against scipy and by hand; published scores; pages and commands."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import scipy.stats

from benchmarks import Table, TableData, TestSplitError, write_table
from benchmarks.registry import open_table
from nas.scoring.correlation import STATISTICS, accuracies, correlate, sample_rows, with_random
from nas.scoring.many import ScoreTable
from nas.scoring.pool import make_pool, unit_scale
from nas.scoring.published import read_scores
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.errors import UserError

SPACE = NasBench201()


@pytest.fixture
def scored(rng):
    """(scores of 60 architectures by two proxies at three seeds, truth)."""
    truth = rng.random(60)
    noisy = truth[:, None] + rng.normal(0, 0.3, (60, 3))
    noisy[:4, 1] = np.nan
    constant_over_seeds = np.repeat(rng.random((60, 1)), 3, 1)
    archs = tuple(SPACE.encode(SPACE.from_code(k)) for k in range(60))
    return ScoreTable(archs, ("noisy", "count"), (0, 1, 2), np.stack([noisy, constant_over_seeds], 1)), truth


def test_statistics_are_means_over_seeds(scored, rng):
    table, truth = scored
    found = correlate(table, truth, rng, resamples=40)
    columns = np.where(np.isnan(table.column("noisy")), -10.0, table.column("noisy")).T
    each = [scipy.stats.spearmanr(column, truth).statistic for column in columns]
    taus = [scipy.stats.kendalltau(column, truth).statistic for column in columns]
    noisy = found["noisy"]
    assert noisy.statistics["spearman"] == pytest.approx(np.mean(each))
    assert noisy.over_seeds["spearman"] == pytest.approx(np.std(each, ddof=1))
    assert noisy.statistics["kendall_tau"] == pytest.approx(np.mean(taus))
    assert noisy.statistics["regret"] == pytest.approx(np.mean([truth.max() - truth[c.argmax()] for c in columns]))
    assert noisy.non_finite == pytest.approx(4 / 3)
    assert found["count"].over_seeds["spearman"] == 0.0
    for name in STATISTICS:
        low, high = noisy.interval[name]
        assert low <= high


def test_intervals_agree_with_fishers(rng):
    """For normal data the bootstrap of Spearman is near the interval of Fisher's transformation (Bonett, Wright)."""
    truth = rng.normal(size=400)
    scores = 0.7 * truth + rng.normal(size=400)
    table = ScoreTable(("",) * 400, ("p",), (0,), scores[:, None, None])
    found = correlate(table, truth, rng, resamples=400)["p"]
    rho = found.statistics["spearman"]
    half = 1.96 * np.sqrt((1 + rho**2 / 2) / 397)
    expected = np.tanh([np.arctanh(rho) - half, np.arctanh(rho) + half])
    np.testing.assert_allclose(found.interval["spearman"], expected, atol=0.025)


def test_random_is_a_baseline_without_correlation(scored, rng):
    table, truth = scored
    found = correlate(with_random(table, rng), truth, rng, resamples=50)["random"]
    low, high = found.interval["spearman"]
    assert low < 0.1
    assert high > -0.1


def test_a_smaller_sample_is_part_of_a_larger_one(nas_bench_201):
    table = open_table(nas_bench_201)
    small, large = (set(sample_rows(table, n, np.random.default_rng(1)).tolist()) for n in (20, 60))
    assert small < large
    assert len(large) == 60
    with pytest.raises(UserError, match="99999"):
        sample_rows(table, 99_999, np.random.default_rng(1))


@pytest.fixture
def published(tmp_path):
    archs = [SPACE.encode(SPACE.from_code(k)) for k in range(0, 15_000, 300)]
    columns = {"arch": archs, "grad_norm": np.arange(50.0), "nwot": [-1e8, *range(49)], "flops": np.arange(50) % 7}
    path = tmp_path / "scores.parquet"
    parquet.write_table(arrow.table(columns), path)
    return path


def test_published_scores_are_read(published, tmp_path):
    found = read_scores(published, SPACE)
    assert found.proxies == ("grad-norm", "nwot", "macs")
    assert np.isnan(found.column("nwot")[0, 0])
    assert found.column("nwot")[49, 0] == 48
    pool = make_pool(SPACE, "nwot,macs", np.random.default_rng(0), size=9, table=str(published))
    assert len({SPACE.key(a) for a in pool.archs}) == len(pool.archs)
    rows = [found.archs.index(SPACE.encode(a)) for a in pool.archs]
    np.testing.assert_array_equal(pool.scores[:, 1], found.column("macs")[rows, 0])
    with pytest.raises(UserError, match="did you mean 'nwot'"):
        make_pool(SPACE, "nwto", np.random.default_rng(0), size=9, table=str(published))
    with pytest.raises(UserError, match=r"absent\.parquet"):
        read_scores(tmp_path / "absent.parquet", SPACE)


def test_the_shared_tables_rank_as_published(shared_table, nas):
    """Spearman with the test accuracy of the 9,445 architectures, as stated with the tables."""
    table = read_scores(shared_table("nas-bench-201/zero_cost_cifar10.parquet"), SPACE)
    accuracy = parquet.read_table(shared_table("nas-bench-201/accuracy.parquet")).to_pydict()
    by_arch = dict(zip(accuracy["arch"], accuracy["cifar10_test_acc_200"], strict=True))
    truth = np.array([by_arch[text] for text in table.archs])
    found = correlate(table, truth, np.random.default_rng(0), resamples=1)
    stated = {"nwot": 0.811, "jacov": 0.799, "params": 0.799, "synflow": 0.778, "macs": 0.770, "epe-nas": 0.772}
    stated |= {"l2-norm": 0.746, "fisher": 0.552, "zen": 0.115, "plain": -0.352}
    for name, rho in stated.items():
        assert found[name].statistics["spearman"] == pytest.approx(rho, abs=0.0006)


def test_unit_scale():
    scores = np.array([[1.0, np.nan, 5.0], [3.0, -2.0, 5.0], [np.inf, 2.0, 5.0]])
    np.testing.assert_array_equal(unit_scale(scores), [[0, 0, 0], [1, 0, 0], [0, 1, 0]])


SMALL = ("--scale", "channels=4", "--scale", "cells_per_stage=1", "--batch-size", "8", "--no-cache")


def test_correlate_command(nas, nas_bench_201):
    arguments = ("proxies", "correlate", "--benchmark", nas_bench_201, "--sample", 6, "--resamples", 5, *SMALL)
    status, out, _ = nas(*arguments, "--proxies", "nwot,snip+macs", "--seeds", 2, "--report", "page.html", "--json")
    found = json.loads(out)
    assert status == 0
    assert list(found["proxies"]) == ["nwot", "snip+macs", "params", "macs", "live-macs", "random"]
    assert found["seeds"] == [0, 1]
    for statistics in found["proxies"].values():
        assert set(STATISTICS) < set(statistics)
        assert -1 <= statistics["spearman"] <= 1
        assert statistics["n"] == 6
    with open("page.html") as file:
        page = file.read()
    assert page.count("<figure>") == 6
    assert "nas proxies correlate" not in page or "--sample" in page
    status, _, error = nas(*arguments, "--proxies", "nwto")
    assert status == 2
    assert "did you mean 'nwot'" in error


def test_test_values_are_read_through_the_one_door(tmp_path, rng):
    """Validation values leave no trace; test values are recorded with what they are for."""
    archs = [SPACE.encode(SPACE.from_code(int(code))) for code in rng.permutation(15_625)[:40]]
    columns = {"val_acc_200": rng.random(40), "test_acc_200": rng.random(40)}
    write_table(tmp_path / "t.safetensors", "my/t", TableData("nas-bench-201", archs, columns, "a test", "none"))
    table, rows = Table.open(tmp_path / "t.safetensors"), np.array([3, 1, 30])
    with pytest.raises(TestSplitError):
        table.column("test_acc")
    found, metric = accuracies(table, rows, "val")
    assert metric.startswith("val_acc")
    assert table.test_uses == []
    np.testing.assert_array_equal(found, table.column("val_acc")[rows])
    found, metric = accuracies(table, rows)
    assert metric.startswith("test_acc")
    assert [use.purpose for use in table.test_uses] == ["correlation of proxies"]
    np.testing.assert_array_equal(found, table.test_values(None, purpose="a test")[rows])
    with pytest.raises(UserError, match="val or test"):
        accuracies(table, rows, "tset")


def test_correlate_command_with_published_scores(nas, nas_bench_201, published):
    status, out, _ = nas(
        "proxies", "correlate", "--benchmark", nas_bench_201, "--scores", published, "--proxies", "all", "--json",
        "--resamples", 2,
    )  # fmt: skip
    found = json.loads(out)
    assert status == 0
    assert list(found["proxies"]) == ["grad-norm", "nwot", "macs", "params", "live-macs", "random"]
    assert found["n"] == 50
    assert found["proxies"]["nwot"]["non_finite"] == 1


def test_score_command(nas):
    arch = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|skip_connect~0|none~1|nor_conv_1x1~2|"
    status, out, _ = nas(
        "proxies", "score", "--space", "nas-bench-201", "--arch", arch, "--proxies", "params,nwot", *SMALL, "--json"
    )
    found = json.loads(out)
    assert status == 0
    model = SPACE.build(SPACE.decode(arch), in_channels=1, channels=4, cells_per_stage=1)
    assert found["scores"]["params"] == sum(p.numel() for p in model.parameters())
    assert found["reasons"] == {}
    status, _, error = nas("proxies", "score", "--space", "nas-bench-201", "--arch", arch, "--proxies", "az-nas")
    assert status == 2
    assert "population" in error


def test_score_command_with_a_network_and_batches_of_ones_own(nas):
    import own_proxies

    import zero_cost

    status, out, _ = nas(
        "proxies", "score", "--model", "own_proxies:network", "--data", "own_proxies:batches", "--proxies",
        "nwot,params,own_proxies:weight_peak,az-expressivity", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert status == 0
    import torch

    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = own_proxies.network()
    torch.set_rng_state(state)
    expected = zero_cost.score(model, own_proxies.batches(), ["nwot"])
    assert found["scores"]["nwot"] == pytest.approx(expected["nwot"])
    assert found["scores"]["params"] == 3 * 4 * 9 + 4 + 144 * 10 + 10
    assert found["scores"]["own_proxies:weight_peak"] == pytest.approx(
        max(p.abs().max().item() for p in model.parameters() if p.dim() > 1)
    )
    assert found["scores"]["az-expressivity"] is None
    assert found["non_finite"] == {"az-expressivity": 1}
    assert found["reasons"]["az-expressivity"]
    status, _, error = nas("proxies", "score", "--model", "own_proxies:absent")
    assert status == 2
    assert "absent" in error


def test_list_command(nas):
    status, out, _ = nas("proxies", "list", "--json")
    names = [p["name"] for p in json.loads(out)["proxies"]]
    assert status == 0
    assert {"nwot", "synflow", "zico", "az-nas"} <= set(names)


def test_search_by_a_proxy(nas):
    status, out, error = nas(
        "search", "--evaluator", "proxy:nwot", "--space", "nas-bench-201", "--strategy", "random-search",
        "--queries", 3, "--scale", "channels=4", "--scale", "cells_per_stage=1", "--no-cache", "--json",
    )  # fmt: skip
    assert status == 0, error
    found = json.loads(out)
    assert found["best"]["metrics"]["nwot"] > 0
    assert nas("resume", found["run"])[0] == 0
    status, _, error = nas("search", "--evaluator", "proxy:nwot")
    assert status == 2
    assert "--space" in error
