"""Reports: complete, self-contained, well-formed, honest about what is not known."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.table import Table
from benchmarks.table_file import TableData, write_table
from nas.comparison_report import comparison_report, write_comparison_plot, write_comparison_report
from nas.evaluators import TableEvaluator
from nas.report import run_report, write_report, write_run_plot
from nas.result import SearchResult
from nas.run import TrialRecord
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.errors import RunError, UserError
from search_spaces.registry import load_space

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and attributes; fails on tags that do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


SPACE = NasBench201()
CODES = np.random.default_rng(3).choice(15625, 30, replace=False)
ARCHS = [SPACE.encode(SPACE.from_code(int(code))) for code in CODES]
SCORES = np.round(np.linspace(60, 89, 30), 2)


@pytest.fixture
def table(tmp_path) -> Table:
    columns = {
        "val_acc_200": SCORES,
        "test_acc_200": SCORES[::-1] - 1.5,
        "params": np.array([SPACE.cost(SPACE.decode(a))["params"] for a in ARCHS]),
    }
    path = tmp_path / "table.safetensors"
    write_table(path, "nas-bench-201/small", TableData("nas-bench-201", ARCHS, columns, "made up", "none"))
    return Table.open(path)


class Known(TableEvaluator):
    """A table evaluator whose table lies in a file of its own."""

    def __init__(self, table):
        object.__setattr__(self, "_known", table)

    table = property(lambda self: self._known)


def result(objectives="val_acc", rows=range(0, 28, 3), evaluator=None, space=SPACE, records=None, **settings):
    if records is None:
        params = [SPACE.cost(SPACE.decode(ARCHS[row]))["params"] for row in rows]
        metrics = [{"val_acc": float(SCORES[r]), "params": p, "cost_seconds": 60.0} for r, p in zip(rows, params)]
        records = [
            TrialRecord(i, ARCHS[row], SPACE.key(SPACE.decode(ARCHS[row])), "done", None, m, told_at=1e9 + i)
            for i, (row, m) in enumerate(zip(rows, metrics))
        ]
    about = {
        "space": "nas-bench-201",
        "evaluator": "table:nas-bench-201/small",
        "label": "val",
        "objectives": objectives,
        "strategy": "random-search",
        "strategy_settings": {"x": 3},
        "budget": {"queries": len(records)},
        "seed": 7,
        "command": "nas search --seed 7 --objectives 'val_acc,params<=1e6'",
        "environment": {"python": "3.11.0"},
        **settings,
    }
    return SearchResult(about, records, space, None, evaluator)


def self_contained(text: str) -> None:
    found = Page(text)
    assert not {"script", "link", "iframe", "img", "object"} & set(found.tags)
    for name, value in found.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith(("#", "data:image/png"))
    assert "url(http" not in text
    assert "@import" not in text
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_a_search_on_a_table(table, tmp_path):
    path = write_report(result(evaluator=Known(table)), tmp_path / "sub" / "report.html")
    text = path.read_text()
    self_contained(text)
    words = Page(text).text.replace("\u00a0", " ")
    # rows 0, 3, ..., 27 of an ascending table: two rows are better than the best of them
    assert f"{SCORES[27]:.2f} % validation accuracy after 10 queries" in words
    assert f"The best in the table has {SCORES[29]:.2f} %" in words
    assert f"ended {SCORES[29] - SCORES[27]:.0f} percentage points from the optimum, at rank 3 of the 30" in words
    assert f"test accuracy, looked up after the search, is {SCORES[2] - 1.5:.2f} %" in words
    for row in range(0, 28, 3):
        assert ARCHS[row] in words
    assert "nas search --seed 7 --objectives 'val_acc,params<=1e6'" in words
    assert "simulated time" in words
    assert "10 min" in words
    assert "conv 3\u00d73" in words  # the drawing
    assert [(u.count, u.purpose) for u in table.test_uses] == [(10, "report")]


def test_reaching_the_optimum_is_said(table):
    assert "the optimum is reached" in run_report(result(rows=[3, 29], evaluator=Known(table)))


def test_several_objectives_and_bounds(table):
    text = run_report(result("val_acc,params,val_acc>=70", evaluator=Known(table)))
    self_contained(text)
    kept = int((SCORES >= 70).sum())
    assert f"of the {kept} architectures of the table that keep the bounds" in text
    assert "of the scaled hypervolume is missing" in text
    assert "against parameters" in text


def test_test_labels_are_announced(table):
    values = table.test_values(None, purpose="test")
    records = [TrialRecord(0, table.text(4), "k", "done", None, {"test_acc": float(values[4])}, told_at=1.0)]
    text = run_report(result("test_acc", evaluator=Known(table), records=records, label="test"))
    assert "Searched on test labels" in text
    assert "looked up after the search" not in text
    assert "Searched on test labels" not in run_report(result(evaluator=Known(table)))


def test_without_test_values_it_says_how_to_get_them(tmp_path):
    path = tmp_path / "t.safetensors"
    data = TableData("nas-bench-201", ARCHS, {"val_acc_200": SCORES}, "made up", "none")
    write_table(path, "nas-bench-201/bare", data)
    text = run_report(result(evaluator=Known(Table.open(path))))
    assert "nas bench add nas-bench-201/bare --space nas-bench-201 --table FILE --merge" in text


def test_without_a_table_the_distance_is_unknown():
    text = run_report(result(evaluator=None, **{"evaluator_": None}))
    assert "no table of the whole space" in text
    assert "percentage points" not in text
    assert "against parameters" in text  # counted by the space
    self_contained(text)


def test_failures_are_grouped_and_escaped():
    records = [
        TrialRecord(0, ARCHS[0], "a", "done", None, {"val_acc": 50.0}, told_at=1.0),
        *(TrialRecord(i, ARCHS[i], "b", "failed", error="<script>alert(1)</script>") for i in (1, 2, 3)),
        TrialRecord(4, ARCHS[4], "c", "failed", error="out of memory"),
        TrialRecord(5, ARCHS[5], "d", "asked"),
    ]
    text = run_report(result(records=records, strategy="</title><b>x"))
    self_contained(text)
    words = Page(text).text
    assert "4 of 6 trials failed" in words
    assert "3 <script>alert(1)</script> 1" in words
    assert words.index("<script>") < words.index("out of memory")
    assert "1 trials were asked and not finished" in words


@pytest.mark.parametrize(
    "records",
    [
        [],
        [TrialRecord(0, ARCHS[0], "a", "failed", error="x", told_at=1.0)],
        [TrialRecord(0, ARCHS[0], "a", "done", None, {"val_acc": 50.0, "params": 1e7}, told_at=1.0)],
    ],
)
def test_nothing_found(records):
    text = run_report(result("val_acc,params<=1e6", records=records))
    self_contained(text)
    assert "No architecture was found" in text


def test_a_space_of_two_cells_is_drawn(rng):
    space = load_space("darts")
    records = [
        TrialRecord(i, space.encode(space.sample(rng)), f"k{i}", "done", None, {"my_score": 3.0 * i}, told_at=float(i))
        for i in range(5)
    ]
    text = run_report(result("my_score:max", records=records, space=space))
    self_contained(text)
    assert ">reduce</text>" in text


def test_an_unwritable_file_leaves_nothing_half(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((UserError, RunError)):
        write_report(result(), tmp_path / "file" / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_equal_runs_give_equal_reports(table):
    assert run_report(result(evaluator=Known(table))) == run_report(result(evaluator=Known(table)))


@pytest.mark.parametrize(("objectives", "panels"), [("val_acc", 1), ("val_acc,params", 2)])
def test_a_plot_has_a_panel_for_the_front(table, tmp_path, objectives, panels):
    write_run_plot(result(objectives, evaluator=Known(table)), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("best so far") <= 1
    write_run_plot(result(objectives, evaluator=Known(table)), tmp_path / "a.png")
    from PIL import Image

    width, height = Image.open(tmp_path / "a.png").size
    assert round(width / height / 1.57) == panels


# -- comparisons --------------------------------------------------------------------------------------------------


def comparison(finals: dict[str, float], spread: float = 0.0, maximize: bool = True):
    """Stand-ins with the fields of nas.comparison; curves rise from 80 to `finals`."""
    from nas.comparison import Comparison, StrategyCurves

    ramp = np.linspace(0, 1, 20)
    noise = np.random.default_rng(0).normal(0, 1, (12, 1)) * spread
    strategies = tuple(
        StrategyCurves(name, 80 + (final - 80) * ramp + noise * ramp, 95.0, maximize) for name, final in finals.items()
    )
    return Comparison(
        "nas-bench-201/small", "val_acc", "val", "val_acc", 20, 12, 5, 95.0, np.linspace(80, 88, 20), strategies
    )


def test_a_comparison_ranks_and_states_the_distance(tmp_path):
    compared = comparison({"slow": 90.0, "fast": 94.0, "best-one": 95.0})
    path = write_comparison_report(
        compared, tmp_path / "c.html", command="nas compare <x>", environment={"nasforge": "1.2"}
    )
    text = path.read_text()
    self_contained(text)
    words = Page(text).text.replace("\u00a0", " ")
    assert words.index("best-one") < words.index("fast") < words.index("slow")
    assert "best-one comes closest: on average 95.00 % validation accuracy after 20 queries" in words
    assert "100 % of its seeds found" in words
    assert "fast follows 1 percentage points behind." in words
    assert "nas compare <x>" in words
    assert "5 to 16" in words
    assert "88.000" in words  # the expectation of random draws


def test_no_order_is_claimed_within_the_error():
    text = comparison_report(comparison({"a": 90.0, "b": 90.05}, spread=1.0))
    assert "no clear order" in text
    assert "no clear order" not in comparison_report(comparison({"a": 80.0, "b": 94.0}, spread=1.0))


def test_a_comparison_as_a_plot(tmp_path):
    write_comparison_plot(comparison({"a": 90.0}), tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    with pytest.raises(UserError, match="svg"):
        write_comparison_plot(comparison({"a": 90.0}), tmp_path / "c.pdf")


def test_reports_need_no_run_folder():
    plain = result()
    assert plain.run is None
    assert "nas resume" not in run_report(plain)
    with_folder = SearchResult(plain.settings, plain.records, SPACE, SimpleNamespace(path="runs/a"), None)
    assert "nas resume runs/a" in run_report(with_folder)
