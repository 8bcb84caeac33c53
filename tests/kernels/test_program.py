"""Programs: spaces, text, identity, and that a builder's rewrites keep every value."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.autodiff import DERIVATIVES, differentiate
from kernels.lower import lower
from kernels.nodes import ELEMENTWISE, FULL, C, G, K, N, Node, S, Unsupported, axes_text, parse_axes, shape_of
from kernels.program import Builder, Program, parse
from kernels.reference import ELEMENTWISE as EXECUTED
from kernels.reference import execute
from search_spaces.common.errors import UserError
from search_spaces.layers import catalog
from search_spaces.layers.space import LayerSpace


def programs(count: int, seed: int = 0) -> list[Program]:
    """Forward and backward programs of random layers."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        lowered = lower(LayerSpace("extended", sampling="nested").sample(rng), mixed=True)
        derivative = differentiate(lowered.program, ("x", *lowered.parameters))
        found += [lowered.program, derivative.forward, derivative.backward]
    return found


def test_text_and_parse_are_inverse():
    for program in programs(60):
        again = parse(program.to_text())
        assert again == program
        assert again.to_text() == program.to_text()
        assert again.structural_hash == program.structural_hash


def test_a_written_program_runs():
    text = """nasforge program 1
%0 = input NGKS x
%1 = sum NS %0
%2 = numel NS
%3 = div %1 %2
%4 = scalar 0.5
%5 = add %3 %4
%6 = sub %0 %5
y = %6
shift = %5
"""
    program = parse(text)
    assert program.to_text() == text
    assert program.scalars == (0.5,)
    assert [axes_text(space) for space in program.spaces] == ["NGKS", "GK", "-", "GK", "-", "GK", "NGKS"]
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    found = execute(program, {"x": x}, groups=2)
    torch.testing.assert_close(found["shift"], x.mean((0, 2)) + 0.5)
    torch.testing.assert_close(found["y"], x - found["shift"][:, None])


@pytest.mark.parametrize("value", [0.1, 1e-5, 0.0, -2.5, 1e300, 5e-324, math.pi, 1 / 3])
def test_numbers_survive_the_text_exactly(value):
    builder = Builder()
    program = builder.program(
        {"y": builder.expand(builder("mul", builder.input("x", FULL), builder.scalar(value)), FULL)}
    )
    (again,) = parse(program.to_text()).scalars
    assert math.copysign(1, again) == math.copysign(1, value)
    assert again == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "begins with"),
        ("nasforge program 9\ny = %0", "begins with"),
        ("nasforge program 1\n%0 = input NGKS x", "at least one output"),
        ("nasforge program 1\n%0 = input SK x\ny = %0", "axes, such as NGKS"),
        ("nasforge program 1\n%0 = input K x\ny = %0", "within groups"),
        ("nasforge program 1\n%0 = input NGKS x\n%1 = swish %0\ny = %1", "an operation of programs"),
        ("nasforge program 1\n%0 = input NGKS x\n%1 = add %0\ny = %1", "2 earlier values"),
        ("nasforge program 1\n%0 = input NGKS x\n%1 = neg %1\ny = %1", "1 earlier values"),
        ("nasforge program 1\n%0 = input NGKS x\n%2 = neg %0\ny = %2", "expected %1"),
        ("nasforge program 1\n%0 = input GK x\n%1 = sum S %0\ny = %1", "among those of its value"),
        ("nasforge program 1\n%0 = input GK x\n%1 = expand K %0\ny = %1", "at least the axes"),
        ("nasforge program 1\n%0 = input NGKS x\ny = %3", "a node from 0 to 0"),
        ("nasforge program 1\n%0 = input NGKS x\ny = %0\ny = %0", "no name twice"),
        ("nasforge program 1\n%0 = input NGKS x\n%1 = input GK x\n%2 = add %0 %1\ny = %2", "no input twice"),
        ("nasforge program 1\n%0 = const one\ny = %0", "could not convert"),
        ("nasforge program 1\n%0 = const\ny = %0", "an attribute"),
        ("nasforge program 1\nnonsense\ny = %0", "a line of a program"),
    ],
)
def test_what_is_no_program_is_refused(text, expected):
    with pytest.raises(UserError, match=expected):
        parse(text)


def test_an_unknown_operation_is_unsupported_and_the_nearest_is_named():
    with pytest.raises(Unsupported, match="did you mean 'sigmoid'"):
        Program((Node("input", (), FULL, "x"), Node("sigmoi", (0,))), (("y", 1),))


def test_the_hash_ignores_run_time_numbers_and_nothing_else():
    b0 = catalog.layer("evonorm-b0")
    first, other = (lower(catalog.layer("evonorm-b0", eps=eps)).program for eps in (1e-5, 1e-3))
    assert first != other
    assert first.structural_hash == other.structural_hash == lower(b0).program.structural_hash
    gradients = [differentiate(p, ("x", "v1")).backward.structural_hash for p in (first, other)]
    assert gradients[0] == gradients[1]
    different = {lower(catalog.layer(name)).program.structural_hash for name in catalog.names()}
    different |= {lower(catalog.layer("batch-norm"), training=False).program.structural_hash}
    same = {"evonorm-s0": "evonorm-s0a", "evonorm-s1": "evonorm-s1a", "evonorm-s2": "evonorm-s2a"}  # but for eps
    assert len(different) == len(catalog.names()) + 1 - 2 * len(same)


def test_constants_of_the_structure_are_hashed():
    hashes = set()
    for number in (2.0, 3.0):
        builder = Builder()
        hashes.add(builder.program({"y": builder("mul", number, builder.input("x", FULL))}).structural_hash)
    assert len(hashes) == 2


def test_the_hash_is_the_same_in_another_process():
    code = (
        "from kernels.lower import lower; from search_spaces.layers import catalog; import sys;"
        "print(lower(catalog.layer('evonorm-b0')).program.structural_hash); assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert found.stdout.strip() == lower(catalog.layer("evonorm-b0")).program.structural_hash, found.stderr


def test_every_operation_has_a_rule_and_an_executor():
    assert set(DERIVATIVES) == set(EXECUTED) == set(ELEMENTWISE)


def test_axes_and_shapes():
    for axes in range(FULL + 1):
        assert parse_axes(axes_text(axes)) == axes
    assert shape_of(FULL, 2, 3, 4, 5) == (2, 12, 5)
    assert [shape_of(space, 2, 3, 4, 5) for space in (C, N | C, N | G, N, 0, N | S)] == [
        (12,),
        (2, 12),
        (2, 3),
        (2,),
        (),
        (2, 5),
    ]


def test_equal_values_are_one_and_commuting_arguments_do_not_matter():
    builder = Builder()
    x, w = builder.input("x", FULL), builder.input("weight", C)
    assert builder("mul", x, w) == builder("mul", w, x)
    assert builder("max", x, builder("mul", w, x)) == builder("max", builder("mul", x, w), x)
    assert builder("sub", x, w) != builder("sub", w, x)
    assert builder("neg", builder("neg", x)) == x
    assert builder("add", x, 0.0) == builder("mul", 1.0, x) == builder("div", x, 1.0) == builder("sub", x, 0.0) == x
    assert builder("sub", x, builder("neg", w)) == builder("add", w, x)
    assert builder.nodes[builder("mul", 0.0, x)].op == "mul"  # a product with 0 hands NaN on
    assert builder.nodes[builder("add", builder("mul", 2.0, 3.0), 1.0)] == Node("const", (), 0, 7.0)
    assert builder.nodes[builder("div", 0.0, 0.0)].op == "div"


@pytest.mark.parametrize(("axes", "outside"), [(N | S, "{GK}"), (S, "NGK"), (K | S, "NG"), (C | S, "N")])
def test_what_does_not_vary_leaves_the_sum(axes, outside):
    builder = Builder()
    x = builder.input("x", FULL)
    factor = builder.input("f", parse_axes(outside.strip("{}")))
    for value in (builder("mul", x, factor), builder("div", builder("neg", x), factor)):
        total = builder.program({"t": builder.sum(value, axes)})
        sums = [node for node in total.nodes if node.op == "sum"]
        assert [total.nodes[node.args[0]].op for node in sums] == ["input"]  # of x itself


def random_value(builder: Builder, leaves: list[int], rng: random.Random) -> int:
    """A random product, quotient, sum or negation of leaves, a few levels deep."""
    values = list(leaves)
    for _ in range(6):
        op = rng.choice(["mul", "mul", "div", "neg", "add", "sub"])
        values.append(builder(op, *(rng.choice(values[-4:] + leaves) for _ in range(ELEMENTWISE[op]))))
    return values[-1]


@pytest.mark.parametrize("seed", range(60))
def test_sums_that_let_go_of_factors_keep_their_value(seed):
    rng = random.Random(seed)
    spaces = {"x": FULL, "a": C, "b": N | C, "c": N | G, "d": N, "e": 0, "f": N | S}
    builder = Builder()
    leaves = [builder.input(name, space) for name, space in spaces.items()]
    value = random_value(builder, [*leaves, builder.const(2.0), builder.const(-1.0)], rng)
    axes = rng.choice([N | S, S, K | S, C | S, N, C, FULL])
    program = builder.program({"value": builder.expand(value, FULL), "sum": builder.sum(value, axes)})
    generator = torch.Generator().manual_seed(seed)
    n, g, k, s = 3, 2, 2, 4
    sizes = {name: shape_of(space, n, g, k, s) for name, space in spaces.items()}
    inputs = {name: torch.rand(size, generator=generator, dtype=torch.float64) + 0.5 for name, size in sizes.items()}
    found = execute(program, inputs, groups=g)
    dims = [dim for axis, dim in ((N, 0), (G, 1), (K, 2), (S, 3)) if axes & axis]
    full = found["value"].reshape(n, g, k, s).sum(dims, keepdim=True)  # also over axes that the value lacks
    total = found["sum"]
    space = program.spaces[program.output("sum")]
    shape = [n if space & N else 1, g if space & G else 1, k if space & K else 1, s if space & S else 1]
    torch.testing.assert_close(total.reshape(shape).expand(full.shape), full, rtol=1e-11, atol=1e-11)


def test_outputs_are_found_by_name():
    program = lower(catalog.layer("batch-norm")).program
    assert program.output("y") == dict(program.outputs)["y"]
    with pytest.raises(UserError, match="moment_0"):
        program.output("momnt_0")
    with pytest.raises(UserError):
        replace(program, outputs=())
