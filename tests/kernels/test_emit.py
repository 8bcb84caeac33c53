"""The text of generated kernels: the rules it keeps, what it depends on, and a kernel written out."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
from dataclasses import replace

import pytest
from kernel_cases import random_cases

from kernels.autodiff import differentiate
from kernels.emit import HEADER, TEMPLATES, Source
from kernels.lower import lower
from kernels.nodes import CONDITIONS, ELEMENTWISE, FULL, C, S, Unsupported
from kernels.program import Builder
from kernels.schedule import Shape, plan
from search_spaces.layers import catalog
from search_spaces.layers.graph import LayerGraph

SHAPES = (
    Shape(8, 64, 196, 8, False, 2),
    Shape(8, 64, 784, 8, True, 2),
    Shape(8, 60, 20000, 4),
    Shape(4096, 64, 1, 8, True),
)


def sources(graph: LayerGraph, shape: Shape, **options) -> list[Source]:
    lowered = lower(graph, mixed=True)
    derivative = differentiate(lowered.program, ("x", *lowered.parameters))
    found = (plan(program, shape, **options) for program in (derivative.forward, derivative.backward))
    return [source for one in found for source in one.sources()]


def texts(count: int):
    graphs = [catalog.layer(name) for name in catalog.CATALOG]
    graphs += [case.graph for preset in ("evonorm24", "extended", "tokens") for case in random_cases(preset, count, 8)]
    for number, graph in enumerate(graphs):
        yield from sources(graph, SHAPES[number % len(SHAPES)], tile=(None, 256)[number % 2])


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [node for node in found if node.func.attr == name]


def test_rules_of_the_text():
    seen = 0
    for source in texts(20):
        tree = ast.parse(source.text)
        loads, widened = calls(tree, "load"), calls(tree, "to")
        assert len(loads) == len(re.findall(r"tl\.load", source.text))
        for load in loads:
            assert {"mask", "other"} <= {keyword.arg for keyword in load.keywords}
            (outer,) = [call for call in widened if call.func.value is load]
            assert ast.unparse(outer.args[0]) == "tl.float32"
        for store in calls(tree, "store"):
            one = "tl.zeros([1" in ast.unparse(store.args[0])
            assert one or "mask" in {keyword.arg for keyword in store.keywords}
        assert not re.search(r"atomic|libdevice|inline_asm|autotune|\bcumsum", source.text)
        for line in re.findall(r"base = .*", source.text):
            assert "to(tl.int64) * C" in line
        stored = [ast.unparse(store.args[0]).split(" + ")[0] for store in calls(tree, "store")]
        assert len(set(stored)) == len(stored), "an address is written once"
        loaded = {ast.unparse(load.args[0]).split(" + ")[0] for load in loads}
        assert not loaded & set(stored), "what a launch writes it does not read"
        seen += 1
    assert seen > 150


def test_functions_use_their_arguments_only():
    for source in texts(6):
        table = symtable.symtable(HEADER + source.text, "kernel", "exec")
        (function,) = [child for child in table.get_children() if child.get_type() == "function"]
        free = {symbol.get_name() for symbol in function.get_symbols() if symbol.is_global()}
        assert free <= {"tl", *dir(builtins)}
        assert set(function.get_parameters()) == set(source.arguments)
        assert set(source.constants) <= set(source.arguments)


def test_numbers_are_handed_over_and_the_text_is_the_same_every_time():
    a = catalog.layer("gn-silu", groups=8)
    b = replace(a, nodes=tuple(replace(n, eps=0.125) if n.eps else n for n in a.nodes))
    one, other, again = (sources(graph, SHAPES[0]) for graph in (a, b, a))
    assert one == other == again
    assert any("scalar_0" in source.arguments for source in one)
    assert not any("1e-05" in source.text for source in one)


def test_the_size_with_the_unit_stride_is_compiled_in_unless_16_divides_it():
    graph = catalog.layer("silu")
    for shape, fixed in (
        (Shape(2, 64, 196), {"S"}),
        (Shape(2, 64, 784), set()),
        (Shape(2, 60, 784), set()),
        (Shape(2, 60, 784, last=True), {"C"}),
        (Shape(2, 64, 196, last=True), set()),
        (Shape(2, 60, 1), {"C"}),
    ):
        for source in sources(graph, shape)[:1]:
            assert {"C", "S"} & set(source.constants) == fixed


def test_every_operation_of_programs_has_a_form():
    assert set(ELEMENTWISE) - set(TEMPLATES) == set()
    for op, arity in ELEMENTWISE.items():
        assert {int(n) for line in TEMPLATES[op] for n in re.findall(r"\{(\d)\}", line)} == set(range(arity))
    for op in CONDITIONS:
        assert TEMPLATES[op][-1].format("1.0", "2.0", t="t")
        assert eval(TEMPLATES[op][-1].format("1.0", "2.0")) == (op != "eq")


def test_unknown_operations_are_refused(monkeypatch):
    builder = Builder()
    program = builder.program({"y": builder("exp", builder.input("x", FULL))})
    monkeypatch.delitem(TEMPLATES, "exp")
    with pytest.raises(Unsupported, match="exp"):
        plan(program, SHAPES[0])


@pytest.mark.parametrize("value", [-1.5, 1e30, float("inf"), -float("inf"), 0.1])
def test_constants_keep_their_values(value):
    builder = Builder()
    y = builder("add", builder.input("x", FULL), builder.const(value))
    (source,) = plan(builder.program({"y": y}), SHAPES[1]).sources()
    (line,) = [line for line in source.text.splitlines() if re.match(r"\s+v\d+ = .* \+ ", line) and "load" not in line]
    (constant,) = [part for part in line.split(" = ")[1].split(" + ") if not re.fullmatch(r"v\d+", part)]
    assert eval(constant) == value


def test_a_kernel_written_out():
    """x less its batch mean: one kernel of partials, one that merges, one that writes."""
    builder = Builder()
    x = builder.input("x", FULL)
    y = builder("sub", x, builder("div", builder.sum(x, FULL & ~C), builder.numel(FULL & ~C)))
    first, merge, last = plan(builder.program({"y": y}), Shape(2, 16, 64)).sources()
    assert "\n".join(first.text.splitlines()[2:]) == FIRST.strip("\n")
    assert "tl.sum" in merge.text
    assert last.text.count("tl.load") == 2
    assert builder.spaces[y] & S


FIRST = """
    pid = tl.program_id(0)
    split = pid % splits
    block = pid // splits % blocks
    n = pid // splits // blocks
    c = block * BC + tl.arange(0, BC)[:, None]
    in_c = c < C
    start = split * BS
    end = tl.minimum(split * BS + BS, S)
    s = start + tl.arange(0, BS)[None, :]
    in_s = s < end
    base = n.to(tl.int64) * C * S + start
    offset = c * S + tl.arange(0, BS)[None, :]
    v0 = tl.load(in_x + base + offset, mask=in_c & in_s, other=0.0).to(tl.float32)
    sum_1 = tl.sum(tl.where(in_c & in_s, v0, 0.0), 1, keep_dims=True)
    tl.store(p0 + (n * C + c) + split * size_NGK, sum_1.to(p0.dtype.element_ty), mask=in_c)
"""
