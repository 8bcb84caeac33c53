"""`nas primitives` as its users meet it, the drawings' numbers, the measured costs, and the page in docs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nas.layers.primitive_cost import measure_cost, trained_numbers
from nas.layers.primitive_page import page, write_page
from nas.layers.primitive_plots import curve, draw_all
from search_spaces.common.errors import UserError
from search_spaces.primitives.primitive import KINDS
from search_spaces.primitives.registry import primitive, primitives

DOCS = Path(__file__).parents[2] / "docs"


def as_json(result) -> dict:
    status, out, err = result
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def test_list_and_its_kinds(nas):
    everything = as_json(nas("primitives", "list", "--json"))["primitives"]
    by_kind = {kind: as_json(nas("primitives", "list", "--kind", kind, "--json"))["primitives"] for kind in KINDS}
    assert sorted(each["name"] for each in everything) == sorted(e["name"] for es in by_kind.values() for e in es)
    assert {each["name"] for each in by_kind["gate"]} >= {"glu", "swiglu", "geglu"}
    swiglu = next(each for each in everything if each["name"] == "swiglu")
    assert "gives half" in swiglu["fits"]
    assert next(each for each in everything if each["name"] == "evonorm-s0")["fits"] == "norm= (with act=identity)"
    status, out, _ = nas("primitives", "list", "--kind", "activation")
    assert status == 0
    assert "max(x, 0) + e x exp(-x^2 / 2)" in out


def test_show(nas, tmp_path):
    found = as_json(nas("primitives", "show", "CRReLU", "--plot", "crrelu.svg", "--json"))
    assert found["name"] == "crrelu"
    assert found["params"] == 1
    assert found["files"] == ["crrelu.svg"]
    assert (tmp_path / "crrelu.svg").read_text().count("<path") > 10
    assert nas("primitives", "show", "silu", "--plot", "silu.png")[0] == 0
    assert (tmp_path / "silu.png").read_bytes().startswith(b"\x89PNG")
    status, out, _ = nas("primitives", "show", "power-norm")
    assert status == 0
    assert "for 64 channels 128" in out
    assert "running statistics" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "crelu"), "did you mean"),
        (("list", "--kind", "gates"), "'gate'"),
        (("show", "layer-norm", "--plot", "x.svg"), "looks at several at once"),
        (("show", "relu", "--plot", "x.pdf"), "x.svg"),
        (("show", "relu", "--cost", "--device", "tpu0"), "cpu"),
    ],
)
def test_wrong_requests_say_what_was_expected(nas, arguments, said):
    status, _, err = nas("primitives", *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert said in err


def test_cost_is_in_the_json_object(nas, monkeypatch):
    monkeypatch.setattr(measure_cost, "__kwdefaults__", {"shape": (2, 8, 4, 4), "repeats": 2, "device": "cpu"})
    cost = as_json(nas("primitives", "show", "rms-norm", "--cost", "--json"))["cost"]
    assert cost["reference"] == "batch-norm"
    assert cost["step_ms"] > 0
    assert cost["activation_bytes"] > 0


def test_trained_numbers_by_hand():
    by_hand = {
        "relu": 0,
        "prelu": 64,
        "xielu": 2,
        "poly-norm": 4,
        "batch-norm": 128,
        "rms-norm": 64,
        "dyt": 1 + 128,
        "derf": 2 + 128,
        "frn-tlu": 192,
        "bn-relu": 128,
        "evonorm-b0": 192,
        "region-norm-l": 7 * 7 * (2 + 1 + 1) + 2,
        "swiglu": 0,
        "skip-init": 1,
        "pre": 128,
        "sandwich": 256,
        "softmax-attention": 4 * (64 * 64 + 64),
    }
    assert {name: trained_numbers(primitive(name)) for name in by_hand} == by_hand


def test_kept_memory_by_hand():
    """In float32: ReLU keeps its result, BatchNorm its input and two numbers a channel, tanh its result."""
    shape, numbers = (4, 8, 6, 6), 4 * 8 * 6 * 6
    assert measure_cost(primitive("tanh"), shape=shape, repeats=1).saved_bytes == 4 * numbers
    batch_norm = measure_cost(primitive("batch-norm"), shape=shape, repeats=1)
    assert batch_norm.saved_bytes == batch_norm.reference_saved_bytes == 4 * (numbers + 2 * 8)
    glu = measure_cost(primitive("glu"), shape=shape, repeats=1)
    assert (glu.saved_bytes, glu.reference) == (2 * 4 * numbers, "relu")
    assert glu.relative_memory == 2


def test_every_kind_and_layout_is_measured():
    for name in ("region-norm-b", "sandwich", "soft", "max-bottleneck", "kan-spline", "evonorm-s0", "geglu", "fixup"):
        found = measure_cost(primitive(name), shape=(2, 16, 8, 8), repeats=1)
        assert found.milliseconds > 0
        assert found.saved_bytes > 0
    with pytest.raises(UserError):
        measure_cost(primitive("relu"), repeats=0)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", np.tanh),
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("crrelu", lambda x: np.maximum(x, 0) + 0.01 * x * np.exp(-(x**2) / 2)),
        ("dyt", lambda x: np.tanh(0.5 * x)),
        ("softplus", lambda x: np.log1p(np.exp(x))),
    ],
)
def test_curves_are_the_function_and_its_slope(name, function):
    x, y, slope = curve(primitive(name), points=200)
    np.testing.assert_allclose(y, function(x), rtol=1e-12)
    np.testing.assert_allclose(slope, (function(x + 1e-6) - function(x - 1e-6)) / 2e-6, atol=1e-8)


def test_every_function_is_drawn_and_is_what_its_module_does():
    drawn = [each for each in primitives() if each.function is not None]
    assert {each.name for each in primitives("activation")} - {each.name for each in drawn} == {"poly-norm"}
    for each in drawn:
        x, y, slope = curve(each, points=40)
        assert np.isfinite(y).all()
        assert np.isfinite(slope).all()
        module: nn.Module = each.make(1).double()
        with torch.no_grad():
            out = module(torch.from_numpy(x).view(1, 1, -1)).flatten().numpy()
        np.testing.assert_allclose(out, y, rtol=1e-6, atol=1e-6, err_msg=each.name)
    titles = [axes.get_title(loc="left") for axes in draw_all(primitives("activation")).axes]
    assert [title for title in titles if title] == [e.name for e in primitives("activation") if e.function]


# -- the page ---------------------------------------------------------------------------------------------------------


def rows(text: str) -> dict[str, list[str]]:
    """{name: cells} of the page's tables."""
    cells = [re.split(r"(?<!\\) \| ", line.strip("| \n")) for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): [cell.replace("\\|", "|") for cell in row] for row in cells}


def test_the_page_is_that_of_the_registry():
    """After a change: `nas primitives page --out docs`."""
    found = rows((DOCS / "primitives.md").read_text())
    assert set(found) == {each.name for each in primitives()}
    for each in primitives():
        assert found[each.name][1] == f"`{each.formula}`", each.name
        assert found[each.name][-1] == each.source, each.name
    assert (DOCS / "primitives.md").read_text() == page()


def test_the_drawings_have_every_name_and_are_small():
    for name, kind in (("activations", "activation"), ("normalisations", "normalisation")):
        path = DOCS / "primitives" / f"{name}.svg"
        assert path.stat().st_size < 200_000
        panels = sum(each.function is not None for each in primitives(kind))
        assert path.read_text().count("<clipPath") == panels


def test_the_page_is_written_by_one_command(nas, tmp_path):
    found = as_json(nas("primitives", "page", "--out", "docs", "--json"))
    assert {Path(path).name for path in found["files"]} == {"primitives.md", "activations.svg", "normalisations.svg"}
    assert (tmp_path / "docs" / "primitives.md").read_text() == page()


@pytest.mark.slow
def test_the_page_is_the_same_each_time(tmp_path):
    before = {path: path.read_bytes() for path in write_page(tmp_path / "docs")}
    assert {path: path.read_bytes() for path in write_page(tmp_path / "docs")} == before
