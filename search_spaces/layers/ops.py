"""The primitives of layers: arity, algebra, and which preset holds them.

Element-wise operations and aggregates of Liu, Brock, Simonyan and Le, Evolving Normalization-Activation Layers,
NeurIPS 2020 (arXiv 2004.02967), table 1; the extended set adds what other published layers need.
"""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest

MOMENTS = ("mean", "rms", "std", "l1")  # mean x, sqrt(mean x^2 + eps), sqrt(mean (x - mean)^2 + eps), mean |x|
AXES = {
    "batch": "batch and space, per channel (BatchNorm)",
    "layer": "space and channels, per sample (LayerNorm of images)",
    "instance": "space, per sample and channel (InstanceNorm)",
    "group": "space and the channels of a group, per sample (GroupNorm)",
    "channel": "channels, per sample and position (LayerNorm of tokens)",
    "channel-group": "the channels of a group, per sample and position",
}


@dataclass(frozen=True)
class Operation:
    """What an element-wise operation is. eps: the default of its guard (0 if it needs none)."""

    name: str
    arity: int
    commutative: bool = False
    eps: float = 0.0


ELEMENTWISE = {
    o.name: o
    for o in (
        Operation("add", 2, commutative=True),
        Operation("mul", 2, commutative=True),
        Operation("div", 2, eps=1e-5),
        Operation("max", 2, commutative=True),
        Operation("neg", 1),
        Operation("sigmoid", 1),
        Operation("tanh", 1),
        Operation("exp", 1),
        Operation("log", 1, eps=1e-5),
        Operation("abs", 1),
        Operation("square", 1),
        Operation("sqrt", 1, eps=1e-5),
        Operation("min", 2, commutative=True),
        Operation("sub", 2),
        Operation("rsqrt", 1, eps=1e-5),
        Operation("erf", 1),
        Operation("softplus", 1),
    )
}
_PAPER = tuple(ELEMENTWISE)[:12]
# What searches over activation functions add (`search_spaces.layers.pointwise`). zeros and ones ignore their input.
POINTWISE = {
    o.name: o
    for o in (
        *(Operation(name, 1) for name in ("zeros", "ones", "identity", "cube", "sin", "cos", "sinh", "cosh", "expm1")),
        *(Operation(name, 1) for name in ("asinh", "atan", "sinc", "gaussian", "erfc", "logsigmoid", "i0e", "i1e")),
        *(Operation(name, 1) for name in ("relu", "elu", "selu", "silu", "softsign", "hardsigmoid")),
        Operation("reciprocal", 1, eps=1e-5),
        Operation("logabs", 1, eps=1e-5),
        Operation("pow", 2, eps=1e-5),
    )
}
# Channel vectors beside v0 and v1: nodes without inputs, all begin as ones.
PARAMETERS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
OPERATIONS = {**ELEMENTWISE, **POINTWISE, **{name: Operation(name, 0) for name in PARAMETERS}}
AGGREGATE_EPS = 1e-5  # inside the square root of rms and std


def concrete(moment: str, axes: str) -> str:
    """The name of an aggregate with its axes: `std-group`."""
    return f"{moment}-{axes}"


def _preset(moments: tuple[str, ...], axes: tuple[str, ...], elementwise: tuple[str, ...] = _PAPER) -> tuple[str, ...]:
    return (*elementwise, *(concrete(m, a) for a in axes for m in moments))


# The unary and binary operators of Bingham and Miikkulainen, Discovering Parametric Activation Functions, Neural
# Networks 2022 (arXiv 2006.03179), in the order of the authors' later release.
PANGAEA_UNARY = (
    *("zeros", "ones", "identity", "neg", "abs", "reciprocal", "square", "exp", "erf", "erfc", "sinh", "cosh", "tanh"),
    *("expm1", "sigmoid", "logsigmoid", "asinh", "atan", "i0e", "i1e", "relu", "elu", "selu", "silu", "softplus"),
    *("softsign", "hardsigmoid"),
)
PANGAEA_BINARY = ("add", "sub", "mul", "div", "pow", "max", "min")
_IMAGE_AXES = ("batch", "layer", "instance", "group")
PRESETS: dict[str, tuple[str, ...]] = {
    "evonorm24": _preset(MOMENTS[:3], _IMAGE_AXES),
    "evonorm21": _preset(MOMENTS[:3], _IMAGE_AXES[1:]),
    "extended": _preset(MOMENTS, tuple(AXES), tuple(ELEMENTWISE)),
    "tokens": _preset(MOMENTS[:3], ("channel", "channel-group")),
    "activations": _PAPER,
    "pangaea": PANGAEA_UNARY + PANGAEA_BINARY,
}


def preset(name: str) -> tuple[str, ...]:
    """The concrete operations of a preset. Errors: UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(name, f"a set of primitives ({one_of(PRESETS)})", nearest(name, PRESETS))
    return PRESETS[name]


def split_name(name: str) -> tuple[str, str]:
    """`std-group` -> ("std", "group"); an element-wise name has no axes. Errors: UserError."""
    op, dash, axes = name.partition("-")
    if not dash and op in OPERATIONS:
        return op, ""
    if op in MOMENTS and axes in AXES:
        return op, axes
    if not dash and op in MOMENTS:
        raise UserError(name, f"a moment with its axes, such as {op}-group ({one_of(AXES)})")
    suggestion = nearest(name, (*PRESETS["extended"], *POINTWISE, *PARAMETERS))
    raise UserError(name, f"a primitive ({one_of(ELEMENTWISE, 20)}, or a moment with axes, std-group)", suggestion)


def arity(op: str) -> int:
    """How many inputs an operation takes; aggregates take one."""
    return OPERATIONS[op].arity if op in OPERATIONS else 1
