"""Formulas: what is printed reads back to the same nodes and values; LaTeX is valid; mistakes have a column."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_reference import live_graphs, random_graph, reference

from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer, names
from search_spaces.layers.formula import DEEPEST, format_formula, merge_equal, parse_formula
from search_spaces.layers.graph import LEAVES, LayerGraph, Node, make_node
from search_spaces.layers.latex import format_latex

SETTINGS = {"affine": False, "groups": 3, "momentum": None, "unbiased": True}


def structure(graph: LayerGraph) -> tuple[str, frozenset[str]]:
    """The output and all live nodes as nested text: the same for graphs that differ in numbering and copies only."""
    texts = dict(enumerate(LEAVES))
    for id, node in graph.live_nodes:
        texts[id] = f"{node.name}~{node.eps!r}~{node.clamp!r}({','.join(texts[i] for i in node.inputs)})"
    return texts[graph.output], frozenset(texts[id] for id, _ in graph.live_nodes)


def with_odd_guards(graph: LayerGraph, rng: np.random.Generator) -> LayerGraph:
    """Some guards other than the defaults."""
    nodes = []
    for node in graph.nodes:
        if node.eps and rng.random() < 0.4:
            node = replace(node, eps=float(rng.choice([0.0, 1e-3, 1e-12, 0.1, 2.0, rng.random()])))
        elif node.op == "div" and rng.random() < 0.4:
            node = replace(node, eps=float(rng.choice([0.0, 1e-7, 1e-5])))
        elif node.op == "exp" and rng.random() < 0.5:
            node = replace(node, clamp=float(rng.choice([30.0, -1.0, 2.5])))
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(0, 14))
def test_round_trip(seed, size):
    rng = np.random.default_rng(seed)
    graph = with_odd_guards(random_graph(rng, size=size, **SETTINGS), rng) if size else LayerGraph((), seed % 4)
    text = format_formula(graph)
    given = {name: getattr(graph, name) for name in (*SETTINGS, "group_size")}
    again = parse_formula(text, **given)
    assert structure(again) == structure(graph), text
    assert format_formula(again) == text
    assert {name: getattr(again, name) for name in given} == given


def test_round_trip_of_values(rng):
    """In float64, against the independent interpreter on the graph that was printed."""
    x = rng.normal(0.2, 1.3, (2, 6, 4))
    params = {name: rng.normal(size=6) for name in ("v0", "v1")}
    for graph in live_graphs(rng, 200, **SETTINGS):
        graph = with_odd_guards(graph, rng)
        again = parse_formula(format_formula(graph), **SETTINGS)
        np.testing.assert_array_equal(reference(again, x, params), reference(graph, x, params))


def test_long_graphs_stay_short():
    """Doubling 60 times: the text grows with the nodes, not with 2^60; nor do long chains nest too deep to read."""
    doubling = [make_node("sigmoid", (0,))] + [make_node("mul", (id, id)) for id in range(4, 64)]
    for nodes in (
        doubling,
        [make_node("neg", (0 if id == 4 else id - 1,)) for id in range(4, 400)],
        [make_node("square", (0 if id == 4 else id - 1,)) for id in range(4, 400)],
        [make_node("abs", (0 if id == 4 else id - 1,)) for id in range(4, 400)],
        [make_node("sub", (0, 0 if id == 4 else id - 1)) for id in range(4, 400)],
    ):
        graph = LayerGraph(tuple(nodes), 3 + len(nodes))
        text = format_formula(graph)
        assert len(text) < 20 * len(nodes)
        assert len(parse_formula(text).nodes) == len(nodes)
        assert len(format_latex(graph)) < 60 * len(nodes)


def test_readable_texts():
    """The shapes a reader expects: no needless brackets, names for what is long and repeated."""
    for text in (
        "x / max(std[batch](x), v1 * x + std[instance](x))",
        "x * sigmoid(v1 * x) / std[group](x)",
        "s = std[batch](x); x / max(s, v1 * x + s * std[instance](x))",
        "max((x - mean[batch](x)) / std[batch](x), 0)",
        "m = mean[batch](x); s = std[batch](x); m2 = mean[group](x); s * m + s * m2 + m * m2",
        "-x^2 + (-x)^2 - (x + 1)^2 - -x",
        "x - (v0 - v1) - v0 * (x + 1)",
        "x / (v0 * v1) * (v0 / v1) / v0 * x",
        "sub(x, min(v0, v1)) + erf(softplus(rsqrt(abs(x))))",
        "x /{eps=0.001} v0 + log[eps=1e-8](x) + exp[clamp=30](x) + rms[channel-group, eps=0](x)",
        "0",
        "v0",
    ):
        assert format_formula(parse_formula(text)) == text


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("x - v0 - v1", lambda x, a, b: x - a - b),
        ("x / a / b", lambda x, a, b: x / a / b),
        ("x - a * b", lambda x, a, b: x - a * b),
        ("-x^2", lambda x, a, b: -(x**2)),
        ("-x**2 * -a", lambda x, a, b: -(x**2) * -a),
        ("x - -a", lambda x, a, b: x + a),
        ("(x + 1) * (a - 1)\n  / (1 + 1)", lambda x, a, b: (x + 1) * (a - 1) / 2),
        ("x * a / b * a", lambda x, a, b: x * a / b * a),
        ("sub(x, a) - 1.0 + 0 + .0", lambda x, a, b: x - a - 1),
        ("y = x + a; z = y * y; z - y", lambda x, a, b: (x + a) ** 2 - (x + a)),
        ("max(x, min(a, b))^2", lambda x, a, b: np.maximum(x, np.minimum(a, b)) ** 2),
        ("square(x)", lambda x, a, b: x**2),
        ("a ^ 2 ^ 2", lambda x, a, b: a**4),
    ],
)
def test_precedence(text, meaning, rng):
    """Python's own arithmetic says what an expression means; guards are switched off."""
    x, a, b = rng.uniform(1, 2, (1, 3, 2)), rng.uniform(1, 2, 3), rng.uniform(1, 2, 3)
    text = re.sub(r"\ba\b", "v0", re.sub(r"\bb\b", "v1", text))
    graph = parse_formula(text, affine=False)
    graph = replace(graph, nodes=tuple(replace(n, eps=0.0) for n in graph.nodes))
    got = reference(graph, x, {"v0": a, "v1": b})
    np.testing.assert_allclose(got, meaning(x, a[None, :, None], b[None, :, None]) + 0 * x)


def test_guards():
    """A division without eps is guarded unless its denominator is provably positive; what is stated stays."""

    def guards(text: str) -> list[float]:
        return [n.eps for n in parse_formula(text).nodes if n.op == "div"]

    assert guards("x / v1") == [1e-5]
    assert guards("x / std[group](x)") == [0]
    assert guards("x / std[group, eps=0](x)") == [1e-5]
    assert guards("x /{eps=0} v1") == [0]
    assert guards("x /{eps=1e-3} exp(x)") == [1e-3]
    assert guards("div[eps=0.5](x, v1)") == [0.5]
    assert guards("x / v1 + x /{eps=0} v1") == [1e-5, 0]
    assert parse_formula("log(x)").nodes == (Node("log", (0,), eps=1e-5),)
    assert parse_formula("exp[clamp=-3](x)").nodes == (Node("exp", (0,), clamp=-3.0),)


def test_equal_parts_are_one_node():
    assert len(parse_formula("tanh(x) * tanh(x) + tanh(x)").nodes) == 3
    assert len(parse_formula("1 + 1 * exp(0)").nodes) == 3
    assert len(parse_formula("unused = exp(x); tanh(x)").nodes) == 1
    twice = LayerGraph((make_node("tanh", (0,)), make_node("tanh", (0,)), make_node("add", (4, 5))), 6)
    assert merge_equal(twice).nodes == (make_node("tanh", (0,)), make_node("add", (4, 4)))


def test_the_formula_of_the_paper_is_the_graph_by_hand():
    """EvoNorm-S0, node by node."""
    nodes = (
        make_node("mul", (3, 0)),
        make_node("sigmoid", (4,)),
        make_node("mul", (0, 5)),
        make_node("std-group", (0,)),
        make_node("div", (6, 7), 0.0),
    )
    assert parse_formula("x * sigmoid(v1 * x) / std[group](x)") == LayerGraph(nodes, 8)


MISTAKES = {
    "": (None, "a formula such as"),
    "  ": (None, "a formula such as"),
    "x *": (4, "a value"),
    "x * sigmod(x)": (5, "did you mean 'sigmoid'"),
    "x * v2": (5, "did you mean 'v"),
    "std(x)": (4, "the axes of std, such as std[group]"),
    "std[grp](x)": (5, "did you mean 'group'"),
    "std[channel-grp](x)": (5, "did you mean 'channel-group'"),
    "std[](x)": (5, "axes (one of batch"),
    "std[group](x": (13, "`)`"),
    "std[group, groups=3](x)": (12, "eps"),
    "mean[batch, eps=1](x)": (13, "no options"),
    "tanh[eps=1](x)": (6, "no options"),
    "exp[eps=1](x)": (5, "clamp"),
    "x # 2": (3, "names, numbers and signs"),
    "max(x)": (6, "2 values of max instead of 1"),
    "tanh(x, v0)": (11, "1 value of tanh instead of 2"),
    "max x, v0": (5, "`(` after max"),
    "x^3": (3, "2 (the only power)"),
    "3 * x": (1, "0 or 1"),
    "x + 1e-5": (5, "0 or 1"),
    "2x": (1, "0 or 1"),
    "x y": (3, "an operator or the end"),
    "x)": (2, "an operator or the end"),
    "(x": (3, "`)`"),
    "s = x": (6, "`;` after the definition of s"),
    "s = x; s = v0; s": (8, "a new name"),
    "max = x; x": (1, "a new name"),
    "s = s; s": (5, "a value or a function"),
    "x;": (2, "an operator or the end"),
    "x = v0": (1, "a new name"),
    "log[eps=-1](x)": (9, "a number of at least 0 for eps"),
    "log[eps=1e999](x)": (9, "a number of at least 0 for eps"),
    "log[eps=](x)": (9, "a number of at least 0 for eps"),
    "x /{eps} v0": (8, "`=`"),
    "x /{eps=1, eps=2} v0": (12, "eps"),
    "x *{eps=1} v0": (4, "a value"),
    "x\n  + ^2": (7, "a value"),
    "(" * (DEEPEST + 1) + "x": (DEEPEST + 1, "brackets within brackets"),
    "tanh(" * 5000 + "x": (5 * DEEPEST + 5, "brackets within brackets"),
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:20])
def test_mistakes_are_marked(text):
    column, expected = MISTAKES[text]
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        parse_formula(text)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    if column is not None:
        assert f"at column {column}, found" in message
        found = text[column - 1 : column]
        shown = message.split("found ")[1]
        assert shown.startswith("the end") if not found else shown.strip("'").startswith(found)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="xv01+-*/^(){}[];=, .eps2\nstdgroupbachmin_é", max_size=30))
def test_any_text_is_a_formula_or_a_user_error(text):
    try:
        graph = parse_formula(text)
    except UserError:
        return
    assert structure(parse_formula(format_formula(graph))) == structure(graph)


def test_latex():
    """Against LaTeX written by hand."""
    assert format_latex(layer("evonorm-s0")) == (
        r"\frac{x \, \sigma\left(v_{1} \, x\right)}{s_{w,h,c/g}\left(x\right)}"
    )
    assert format_latex(parse_formula("x - v0 * -x")) == r"x - v_{0} \, \left(-x\right)"
    assert format_latex(parse_formula("sqrt(x) + sqrt(x^2)")) == r"\sqrt[\pm]{x} + \sqrt{x^{2}}"
    assert format_latex(parse_formula("rsqrt(x)")) == r"\frac{1}{\sqrt{\left|x\right|}}"
    assert format_latex(parse_formula("rsqrt(exp(x))")) == r"\frac{1}{\sqrt{\exp\left(x\right)}}"
    assert format_latex(parse_formula("sub(1, -x)")) == r"1 - \left(-x\right)"
    assert format_latex(parse_formula("(x / v0)^2")) == r"\left(\frac{x}{v_{0}}\right)^{2}"


def test_latex_can_be_drawn(rng):
    """matplotlib's mathematics parser accepts it, with nothing left over."""
    from matplotlib import mathtext

    parser = mathtext.MathTextParser("path")
    graphs = [layer(name) for name in names()] + live_graphs(rng, 60)
    for graph in graphs:
        latex = format_latex(graph)
        assert latex.count("{") == latex.count("}")
        assert latex.count(r"\left") == latex.count(r"\right")
        parser.parse(f"${latex}$")
