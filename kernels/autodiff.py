"""The derivative of a program: reverse mode on its nodes, with forward and backward in one table of values.

Every rule follows what torch's autograd does to `search_spaces.layers.evaluate`: ties of max and min are split evenly,
|x| has slope 0 at 0, conditions and signs have none, a guard has slope 1 and a clamp passes gradients up to its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kernels.nodes import FULL, REDUCTIONS, C, S
from kernels.program import Builder, Program
from search_spaces.common.errors import UserError


@dataclass(frozen=True)
class Derivative:
    """A program and its backward.

    forward: the program with further outputs `saved_<k>`, the statistics that the backward needs; its first outputs
    and their values are the program's. backward: inputs `x`, `dy`, the parameters it needs, running moments in
    evaluation, and `saved_<k>` of the same spaces as the forward's outputs; outputs `d<name>` for each name asked
    for, of that input's space.
    """

    forward: Program
    backward: Program


def differentiate(program: Program, wrt: Iterable[str] = ("x",), output: str = "y") -> Derivative:
    """The derivative of an output by the inputs `wrt`, as the product with `dy`, which has the output's space.

    Reductions of the forward that the backward needs are saved, together with reductions that need no `dy` and no
    further pass of the forward, such as the mean beside a variance; everything else is computed again from x. An
    input that the program does not use gets zeros over channels, x over all axes. Errors: UserError for an unknown
    output, and for no names or some twice.
    """
    wrt = tuple(wrt)
    if not wrt or len(set(wrt)) < len(wrt) or "dy" in wrt:
        raise UserError(str(wrt), "names of inputs, none twice")
    builder = Builder()
    ids: list[int] = []
    for node in program.nodes:
        ids.append(builder.copy(node, [ids[a] for a in node.args]))
    wanted = {ids[program.inputs[name]] for name in wrt if name in program.inputs}
    gradients = _reverse(builder, ids, ids[program.output(output)], wanted)
    outputs = {}
    for name in wrt:
        at = program.inputs.get(name)
        gradient = None if at is None else gradients.get(ids[at])
        space = program.spaces[at] if at is not None else FULL if name == "x" else C
        outputs[f"d{name}"] = builder.expand(builder.const(0.0) if gradient is None else gradient, space)
    backward, saved = _with_saved(builder, outputs, program.depth)
    kept = {name: ids[at] for name, at in program.outputs}
    return Derivative(builder.program({**kept, **saved}), backward)


def _reverse(builder: Builder, ids: list[int], output: int, wanted: set[int]) -> dict[int, int]:
    """The gradient of every value between the output and the `wanted` ones, by node; ids are in topological order."""
    between = set(wanted)
    for id in ids:
        if any(a in between for a in builder.nodes[id].args):
            between.add(id)
    contributions: dict[int, dict[int, int]] = {output: {}}  # by node: by the space they are to be summed from, a sum
    contributions[output][builder.spaces[output]] = builder.input("dy", builder.spaces[output])
    gradients: dict[int, int] = {}
    for id in sorted(set(ids), reverse=True):
        parts = contributions.pop(id, None)
        if parts is None:
            continue
        space = builder.spaces[id]
        total: int | None = None
        for over, contribution in parts.items():
            reduced = builder.sum(contribution, over & ~space)
            total = reduced if total is None else builder("add", total, reduced)
        assert total is not None
        gradients[id] = total
        node = builder.nodes[id]
        if not node.args:
            continue
        # A reduction's gradient is spread over its argument's space; others are consumed where the node lives.
        over = builder.spaces[node.args[0]] if node.op in REDUCTIONS else space
        for source, part in zip(node.args, _pullback(builder, id, total), strict=True):
            if part is not None and source in between:
                parts_of_source = contributions.setdefault(source, {})
                known = parts_of_source.get(over)
                parts_of_source[over] = part if known is None else builder("add", known, part)
    return gradients


def _pullback(builder: Builder, id: int, gradient: int) -> tuple[int | None, ...]:
    node = builder.nodes[id]
    if node.op in ("sum", "expand"):
        return (gradient,)
    if node.op == "var":
        distance = builder("sub", node.args[0], builder.mean(node.args[0], node.axes))
        return (builder("mul", builder("div", builder("mul", 2.0, gradient), builder.numel(node.axes)), distance),)
    return DERIVATIVES[node.op](builder, gradient, id, *node.args)


Rule = Callable[..., tuple[int | None, ...]]  # (builder, gradient, the value, its arguments) -> theirs


def _unless_less(b: Builder, g: int, a: int, c: int) -> int:
    """Nothing where a < c, half the gradient at a tie."""
    return b("where", b("lt", a, c), 0.0, b("where", b("eq", a, c), b("mul", 0.5, g), g))


def _div(b: Builder, g: int, y: int, a: int, c: int) -> tuple[int, int]:
    share = b("div", g, c)
    return share, b("neg", b("mul", share, y))


def _i1e(b: Builder, g: int, y: int, a: int) -> tuple[int]:
    inside = b("sub", b("i0e", a), b("add", b("mul", b("sign", a), y), b("div", y, a)))
    return (b("mul", g, b("where", b("eq", a, 0.0), 0.5, inside)),)


def _pow(b: Builder, g: int, y: int, a: int, c: int) -> tuple[int, int]:
    """Slopes 0 of a to the power 0, and by the exponent of 0 to the power of what is not negative."""
    by_base = b("where", b("eq", c, 0.0), 0.0, b("mul", g, b("mul", c, b("pow", a, b("sub", c, 1.0)))))
    by_exponent = b("mul", g, b("mul", y, b("log", a)))
    at_zero = b("where", b("le", 0.0, c), 0.0, by_exponent)
    return by_base, b("where", b("eq", a, 0.0), at_zero, by_exponent)


def _softplus(b: Builder, g: int, y: int, a: int) -> tuple[int]:
    return (b("where", b("lt", b.const(20.0), a), g, b("mul", g, b("sigmoid", a))),)


DERIVATIVES: dict[str, Rule] = {
    "neg": lambda b, g, y, a: (b("neg", g),),
    "abs": lambda b, g, y, a: (b("mul", g, b("sign", a)),),
    "sign": lambda b, g, y, a: (None,),
    "square": lambda b, g, y, a: (b("mul", b("mul", 2.0, g), a),),
    "exp": lambda b, g, y, a: (b("mul", g, y),),
    "log": lambda b, g, y, a: (b("div", g, a),),
    "sqrt": lambda b, g, y, a: (b("div", b("mul", 0.5, g), y),),
    "rsqrt": lambda b, g, y, a: (b("mul", b("mul", -0.5, g), b("mul", y, b("square", y))),),
    "sigmoid": lambda b, g, y, a: (b("mul", g, b("mul", y, b("sub", 1.0, y))),),
    "tanh": lambda b, g, y, a: (b("mul", g, b("sub", 1.0, b("square", y))),),
    "erf": lambda b, g, y, a: (b("mul", b("mul", 2 / math.sqrt(math.pi), g), b("exp", b("neg", b("square", a)))),),
    "softplus": _softplus,
    "sin": lambda b, g, y, a: (b("mul", g, b("cos", a)),),
    "cos": lambda b, g, y, a: (b("neg", b("mul", g, b("sin", a))),),
    "atan": lambda b, g, y, a: (b("div", g, b("add", b("square", a), 1.0)),),
    "i0e": lambda b, g, y, a: (b("mul", g, b("sub", b("i1e", a), b("mul", b("sign", a), y))),),
    "i1e": _i1e,
    "add": lambda b, g, y, a, c: (g, g),
    "sub": lambda b, g, y, a, c: (g, b("neg", g)),
    "mul": lambda b, g, y, a, c: (b("mul", g, c), b("mul", g, a)),
    "div": _div,
    "pow": _pow,
    "max": lambda b, g, y, a, c: (_unless_less(b, g, a, c), _unless_less(b, g, c, a)),
    "min": lambda b, g, y, a, c: (_unless_less(b, g, c, a), _unless_less(b, g, a, c)),
    "guard": lambda b, g, y, a, c: (g, None),
    "clamp_max": lambda b, g, y, a, c: (b("where", b("le", a, c), g, 0.0), None),
    "lt": lambda b, g, y, a, c: (None, None),
    "le": lambda b, g, y, a, c: (None, None),
    "eq": lambda b, g, y, a, c: (None, None),
    "where": lambda b, g, y, c, a, d: (None, b("where", c, g, 0.0), b("where", c, 0.0, g)),
}


def _with_saved(builder: Builder, outputs: dict[str, int], depth: int) -> tuple[Program, dict[str, int]]:
    """The backward with its dy-free reductions of at most `depth` as inputs, and these reductions by name."""
    from_dy: list[bool] = []
    depths: list[int] = []
    for node in builder.nodes:
        reduces = node.op in REDUCTIONS and bool(builder.spaces[node.args[0]] & S)
        depths.append(max((depths[a] for a in node.args), default=0) + reduces)
        from_dy.append(node.attr == "dy" or any(from_dy[a] for a in node.args))
    stack, needed = list(outputs.values()), set(outputs.values())
    leaves = set()
    while stack:
        id = stack.pop()
        if builder.nodes[id].op in REDUCTIONS and not from_dy[id] and depths[id] <= depth:
            leaves.add(id)
        else:
            new = set(builder.nodes[id].args) - needed
            needed |= new
            stack += new
    backward, ids = Builder(), {}
    saved: dict[str, int] = {}
    for id in sorted(needed):
        if id in leaves:
            name = f"saved_{len(saved)}"
            saved[name] = id
            ids[id] = backward.input(name, builder.spaces[id])
        else:
            node = builder.nodes[id]
            ids[id] = backward.copy(node, [ids[a] for a in node.args])
    return backward.program({name: ids[id] for name, id in outputs.items()}), saved
