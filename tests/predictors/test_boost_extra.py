"""Boosted trees of the extra `boost`: what is said without it, what it learns with it, and that the pins fit."""

import importlib
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from predictors.graphs import as_table
from predictors.registry import make_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("xgboost", "lightgbm")


@pytest.fixture(scope="module")
def cells():
    space, rng = load_space("nas-bench-201"), np.random.default_rng(0)
    table = as_table([space.graph(space.sample(rng)) for _ in range(80)], space.vocabulary)
    count = {op: (table.ops == i).sum(1) for i, op in enumerate(space.vocabulary)}
    quality = count["nor_conv_3x3"] - 0.4 * count["avg_pool_3x3"] + 0.01 * rng.normal(size=80)
    return table, quality


def fitted(kind, library, table, y):
    predictor = make_predictor(kind, "nas-bench-201", table.vocabulary, library=library, trees=100)
    return predictor.fit(table.take(np.arange(50)), y[:50], rng=np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["gbt-graf", "xgb-plus"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_without_the_extra_it_is_named(cells, monkeypatch, kind, library):
    found = importlib.import_module

    def absent(name, *rest):
        if name == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=rf"{library}.*nasforge\[boost\].*sklearn"):
        fitted(kind, library, *cells)


@pytest.mark.parametrize("library", LIBRARIES)
def test_with_the_extra_it_learns(cells, library):
    pytest.importorskip(library)
    table, y = cells
    predictor = fitted("gbt-graf", library, table, y)
    assert kendalltau(predictor.predict(table.take(np.arange(50, 80))), y[50:])[0] > 0.4
    again = fitted("gbt-graf", library, table, y)
    np.testing.assert_array_equal(again.predict(table), predictor.predict(table))


def test_an_unknown_library_is_refused(cells):
    with pytest.raises(UserError, match="xgboost or lightgbm"):
        fitted("gbt-graf", "catboost", *cells)


def test_the_extra_brings_the_libraries_in_versions_that_are_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wanted = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in extras["boost"])
    assert set(wanted) == set(LIBRARIES)
    for name, least in wanted.items():
        assert [int(part) for part in pinned[name].split(".")] >= [int(part) for part in least.split(".")]
