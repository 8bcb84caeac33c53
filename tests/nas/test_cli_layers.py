"""`nas layers` as its users meet it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from search_spaces.layers.formula import parse_formula
from search_spaces.layers.module import GraphLayer


def as_json(result) -> dict:
    status, out, err = result
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def test_search_resume_report_and_export(nas, tmp_path):
    options = ("--budget", "4", "--steps", "35", "--first", "gn-silu", "--out", "run")
    found = as_json(nas("layers", "search", *options, "--json"))
    assert {"best", "front", "queries", "funnel", "formula", "run", "warnings"} <= set(found)
    assert found["queries"] == 4
    assert found["funnel"]["trained"] + sum(found["funnel"]["rejected"].values()) >= 4
    parse_formula(found["formula"])
    assert as_json(nas("resume", "run", "--json"))["best"] == found["best"]
    assert nas("report", "run")[0] == 0
    assert nas("layers", "export", "run:best", "--to", "layer.py")[0] == 0
    assert nas("layers", "export", "run:best", "--to", "layer.py")[0] == 2  # not without --force
    program = (
        "import sys, torch\nfor name in ('nas', 'search_spaces'):\n    sys.modules[name] = None\n"
        "from layer import Layer\ntorch.manual_seed(0)\nx = torch.randn(4, 8, 5, 5)\n"
        "torch.save(Layer(8)(x).detach(), 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5, 5)
    expected = GraphLayer(parse_formula(found["formula"], group_size=4), 8)(x)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt", weights_only=True), expected, rtol=1e-5, atol=1e-5)


def test_compare(nas):
    found = as_json(
        nas("layers", "compare", "--layers", "bn-relu,max(x, 0)", "--steps", "12", "--seeds", "2", "--json")
    )
    assert [row["name"] for row in found["layers"]] == ["bn-relu", "max(x, 0)"]
    assert {"name", "anchor", "val_acc", "latency_ms", "activation_bytes"} <= set(found["layers"][0])
    assert found["layers"][0]["activation_bytes"] > found["layers"][1]["activation_bytes"]


@pytest.mark.parametrize(("sampling", "ignored", "passed"), [("flat", 0.68, 0.11), ("nested", 0.63, 0.30)])
def test_sample_counts_reasons(nas, sampling, ignored, passed):
    found = as_json(nas("layers", "sample", "--count", "3000", "--sampling", sampling, "--json"))
    assert found["count"] == found["passed"] + sum(found["rejected"].values()) == 3000
    assert found["rejected"]["ignores_input"] / 3000 == pytest.approx(ignored, abs=0.03)
    assert found["passed"] / 3000 == pytest.approx(passed, abs=0.035)


def test_list_and_show(nas, tmp_path):
    names = [row["name"] for row in as_json(nas("layers", "list", "--json"))["layers"]]
    assert {"evonorm-b0", "evonorm-s0", "bn-relu", "gn-silu", "frn-tlu"} <= set(names)
    found = as_json(nas("layers", "show", "evonorm-b0", "--out", "b0.svg", "--json"))
    assert parse_formula(found["formula"]).live_nodes
    assert (tmp_path / "b0.svg").read_text().lstrip().startswith("<svg")
    assert "frac" in as_json(nas("layers", "show", "evonorm-s0", "--latex", "--json"))["formula"]


def test_replace_reports_every_normalisation(nas):
    found = as_json(nas("layers", "replace", "evonorm-s0", "--model", "small_models:plain", "--json"))
    assert found["replaced"] == 2
    assert [place["action"] for place in found["places"]] == ["layer", "layer", "keep"]


BAD = {
    "layer": (["show", "evonorm-s9"], "did you mean 'evonorm-s"),
    "formula": (["show", "x * sigmoid(x"], "column"),
    "primitives": (["sample", "--ops", "evonorm42"], "did you mean 'evonorm2"),
    "sampling": (["sample", "--sampling", "nestled"], "did you mean 'nested'"),
    "stage": (["sample", "--funnel", "statik"], "did you mean 'static'"),
    "count": (["sample", "--count", "0"], "0"),
    "data": (["search", "--data", "digitz"], "did you mean 'digits'"),
    "anchor": (["search", "--anchors", "resnett"], "did you mean 'resnet'"),
    "objective": (["search", "--objectives", "test_acc"], "test_acc"),
    "target": (["export", "bn-relu", "--to", "layer.txt"], "layer.txt"),
    "no layers": (["compare", "--layers", ","], "at least one layer"),
    "seeds": (["compare", "--layers", "bn-relu", "--seeds", "0"], "at least one seed"),
    "model": (["replace", "bn-relu", "--model", "small_models:plian"], "did you mean 'plain'"),
    "model without norms": (["replace", "bn-relu", "--model", "torch.nn:Identity"], "normalisation"),
    "policy": (["replace", "bn-relu", "--model", "small_models:plain", "--lone", "kepp"], "did you mean 'keep'"),
    "layout": (["export", "bn-relu", "--to", "a.py", "--layout", "nhwc"], "nhwc"),
    "first": (["search", "--first", "bn-rellu"], "did you mean 'bn-relu'"),
    "ignores x": (["compare", "--layers", "sigmoid(v1) + v0"], "depends on x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_helpful_line(nas, case):
    arguments, said = BAD[case]
    status, out, err = nas("layers", *arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
