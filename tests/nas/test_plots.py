"""Figures: what is drawn is what was given; files and SVG text are clean."""

import itertools
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from nas import plots
from nas.metrics import format_count, format_metric, format_seconds, metric_label, metric_words
from nas.objectives import Objective
from search_spaces.common.errors import UserError

ACC, PARAMS = Objective("val_acc", True), Objective("params", False)


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


@pytest.fixture
def two(rng):
    return {name: np.maximum.accumulate(rng.uniform(80, 90, (21, 50)), axis=1) for name in ("a", "b")}


def test_medians_and_quartiles(two):
    figure = plots.curves(two, metric="val_acc", optimum=92.0, expectation=np.linspace(81, 89, 50))
    drawn = lines(figure)
    assert set(drawn) == {"a", "b", plots.EXPECTATION, plots.OPTIMUM}
    for name, values in two.items():
        x, y = drawn[name].get_data()
        assert x.tolist() == list(range(1, 51))
        assert np.allclose(y, np.sort(values, axis=0)[10])  # the eleventh of 21
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert np.isclose(band[:, 1].max(), np.sort(two["a"], axis=0)[15].max())
    assert np.allclose(drawn[plots.OPTIMUM].get_ydata(), 92)


def test_missing_values_count_as_worst():
    curve = np.array([[np.nan, 3.0], [np.nan, 5.0], [2.0, 2.0]])
    up = lines(plots.curves({"a": curve}, metric="score"))["a"].get_ydata()
    assert np.array_equal(up, [np.nan, 3.0], equal_nan=True)
    down = lines(plots.curves({"a": curve}, metric="score", maximize=False))["a"].get_ydata()
    assert np.array_equal(down, [np.nan, 3.0], equal_nan=True)


@pytest.mark.parametrize("maximize", [True, False])
def test_regret_is_the_distance_from_the_optimum(two, maximize):
    optimum = 95.0 if maximize else 75.0
    figure = plots.curves(two, metric="val_acc", maximize=maximize, optimum=optimum, regret=True, log_queries=True)
    assert np.allclose(lines(figure)["a"].get_ydata(), abs(optimum - np.median(two["a"], axis=0)))
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    with pytest.raises(UserError, match="optimum"):
        plots.curves(two, metric="val_acc", regret=True)


@pytest.mark.parametrize("maximize", [True, False])
def test_the_end_of_every_curve_and_the_optimum_are_in_view(two, maximize):
    values = {name: v if maximize else -v for name, v in two.items()}
    optimum = 92.0 if maximize else -92.0
    low, high = plots.curves(values, metric="score", maximize=maximize, optimum=optimum).axes[0].get_ylim()
    for v in values.values():
        assert low < np.median(v[:, -1]) < high
    assert low < optimum < high


def test_run_curve_over_queries_and_over_the_clock():
    best, values = np.array([np.nan, 2.0, 2.0, 3.0]), np.array([np.nan, 2.0, 1.0, 3.0])
    figure = plots.run_curve(best, metric="val_acc", values=values, optimum=4.0, expectation=np.arange(9.0))
    drawn = lines(figure)
    assert np.array_equal(drawn["best so far"].get_ydata(), best, equal_nan=True)
    assert len(drawn[plots.EXPECTATION].get_ydata()) == 4
    seconds = np.array([3600.0, 7200.0, 10800.0, 86400.0])
    clock = plots.run_curve(best, metric="val_acc", seconds=seconds, expectation=np.arange(9.0))
    assert lines(clock)["best so far"].get_xdata().tolist() == [1, 2, 3, 24]
    assert clock.axes[0].get_xlabel() == "simulated time (hours)"
    assert plots.EXPECTATION not in lines(clock)


@pytest.mark.parametrize("signs", [(True, False), (True, True), (False, False), (False, True)])
def test_the_step_line_bounds_what_the_front_dominates(rng, signs):
    """Points on the step line are attained; a little better than it, nothing is."""
    first, second = (Objective(name, up) for name, up in zip(("u", "v"), signs, strict=True))
    direction = np.array([1.0 if up else -1.0 for up in signs])
    points = rng.random((40, 2))
    front = np.array([p for p in points if not (((points - p) * direction >= 0).all(1) & (points != p).any(1)).any()])
    figure = plots.scatter(points, (first, second), exact_front=front, front=front)
    x, y = lines(figure)["exact front of the table"].get_data()
    line = np.stack([y, x], 1)

    def attained(p, slack):
        return ((front - p) * direction >= slack).all(axis=1).any()

    for a, b in itertools.pairwise(line):
        middle = (a + b) / 2
        assert attained(middle, -1e-9)
        assert not attained(middle + direction * 1e-6, 0)
    assert {tuple(p) for p in front} <= {tuple(p) for p in line}


def test_svg_is_plain_deterministic_and_free_of_clashes(two):
    texts = [plots.svg(plots.curves(two, metric="val_acc", optimum=92.0), "one") for _ in range(2)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("<svg ")
    for unwanted in ("<?xml", "<!DOCTYPE", "metadata", "matplotlib", "<!--"):
        assert unwanted not in texts[0]
    root = ET.fromstring(texts[0])
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert ids
    assert len(ids) == len(set(ids))
    assert all(i.startswith("one-") for i in ids)
    links = [e.get("{http://www.w3.org/1999/xlink}href") for e in root.iter()]
    assert {link[1:] for link in links if link} <= set(ids)
    other = plots.svg(plots.curves(two, metric="val_acc"), "two")
    assert not {i for i in ids if f'id="{i}"' in other}


def test_names_are_no_markup(two):
    figure = plots.curves({"a$_b$<c>": two["a"]}, metric="val_acc")
    ET.fromstring(plots.svg(figure))
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "a$_b$<c>"


def test_many_dots_do_not_make_a_heavy_page(rng):
    points = rng.random((20_000, 2))
    assert len(plots.svg(plots.scatter(points, (ACC, PARAMS)))) < 700_000  # 2.4 million as single dots


def test_save_by_ending(two, tmp_path):
    figure = plots.curves(two, metric="val_acc")
    plots.save(figure, tmp_path / "a.svg")
    plots.save(figure, tmp_path / "a.PNG")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"a\.svg"):
        plots.save(figure, tmp_path / "a.jpg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.PNG", "a.svg"]


def test_matplotlib_waits_and_pyplot_stays_away():
    program = (
        "import sys, numpy as np, nas.plots as p, nas.report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        "state = lambda: {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = state()\n"
        "p.svg(p.curves({'a': np.ones((2, 3))}, metric='val_acc'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert state() == before\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_metrics_in_words():
    assert metric_label("val_acc") == "validation accuracy (%)"
    assert metric_words("test_acc_12_seed3") == "test accuracy after 12 epochs (seed 3)"
    assert metric_label("raspi4_latency_ms") == "raspi4 latency (ms)"
    assert metric_label("val_rocauc") == "validation ROC-AUC"
    assert metric_words("My Score") == "My Score"
    plain = {
        format_metric("val_acc", 91.5734): "91.57 %",
        format_metric("params", 1072426): "1.072 M",
        format_metric("latency_ms", 14.2049): "14.2 ms",
        format_metric("latency_ms", float("nan")): "\u2013",
        format_metric("train_seconds", 12000.0): "3 h 20 min",
        format_count(999.0): "999",
        format_seconds(59.4): "59 s",
        format_seconds(86399.0): "24 h",
        format_seconds(90000.0): "1 d 1 h",
    }
    assert {found.replace("\u00a0", " "): expected for found, expected in plain.items()} == {
        v: v for v in plain.values()
    }
