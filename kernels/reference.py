"""Programs executed with torch operations, in any floating-point dtype: the reference of every other executor.

It is the path on CPUs, of float64, of exports, and of backwards inside operators: nothing here needs autograd, and
autograd, torch.compile and torch.export can follow all of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kernels.lower import LAYOUTS
from kernels.nodes import FULL, C, G, K, N, S, axes_text
from kernels.program import Program
from search_spaces.common.errors import UserError

_DIMS = {N: 0, G: 1, K: 2, S: 3}
_HALVES = (torch.float16, torch.bfloat16)
Value = Tensor | float


def execute(program: Program, inputs: Mapping[str, Tensor], *, groups: int = 1) -> dict[str, Tensor]:
    """The outputs of a program by name.

    inputs: by name, each of the shape of its space (`program.shape_of`): `x` and `dy` [N, C, S], channel vectors [C],
    and so on; `x` also where the program does not use it, for its sizes. groups: how many groups the channels fall
    into. Half precision is computed in float32; `y` and `dx` have the dtype of `x`, other outputs that of the
    computation. Outputs may be views of inputs and of each other. Errors: UserError for a missing input, a shape that
    does not fit, and groups that do not divide the channels.
    """
    for name in ("x", *program.inputs):
        if name not in inputs:
            raise UserError(name, f"a tensor for each input ({', '.join(inputs)} are given)")
    spaces = {"x": FULL} | {name: program.spaces[at] for name, at in program.inputs.items()}
    tensors = {name: _spread(name, inputs[name], space, groups) for name, space in spaces.items()}
    sizes = _sizes(spaces, tensors)
    like = tensors["x"]
    values: list[Value] = []
    for node in program.nodes:
        args = [values[a] for a in node.args]
        if node.op == "input":
            values.append(tensors[str(node.attr)])
        elif node.op in ("const", "scalar"):
            values.append(float(node.attr or 0.0))
        elif node.op == "numel":
            values.append(_product(size for axis, size in sizes.items() if node.axes & axis))
        elif node.op == "expand":
            shape = [size if node.axes & axis else 1 for axis, size in sizes.items()]
            values.append(_tensor(args[0], like).expand(shape))
        elif node.op == "sum":
            values.append(_tensor(args[0], like).sum(_dims(node.axes), keepdim=True))
        elif node.op == "var":
            value = _tensor(args[0], like)  # two passes: no cancellation for a mean far above the deviation
            distance = value - value.mean(_dims(node.axes), keepdim=True)
            values.append(distance.square().mean(_dims(node.axes), keepdim=True))
        else:
            if node.op not in _PLAIN or not any(isinstance(a, Tensor) for a in args):
                args = [_tensor(a, like) for a in args]
            values.append(ELEMENTWISE[node.op](*args))
    found = {name: _joined(_tensor(values[at], like), program.spaces[at]) for name, at in program.outputs}
    return {name: v.to(inputs["x"].dtype) if name in ("y", "dx") else v for name, v in found.items()}


def to_program(x: Tensor, layout: str, flat: bool) -> Tensor:
    """A layer's input (or a gradient of its output) as `x` [N, C, S] of its lowered program.

    x: [B, C, ...], or [B, positions, C] with layout `tokens`. Errors: UserError for another layout.
    """
    if layout not in LAYOUTS:
        raise UserError(layout, f"a layout: {' or '.join(LAYOUTS)}")
    if layout == "tokens":
        return x.flatten(0, -2).unsqueeze(-1) if flat else x.transpose(1, 2)
    if not flat:
        return x.reshape(*x.shape[:2], -1) if x.ndim != 2 else x.unsqueeze(-1)
    return x.movedim(1, -1).reshape(-1, x.shape[1], 1)


def from_program(y: Tensor, shape: Sequence[int], layout: str, flat: bool) -> Tensor:
    """Inverse of `to_program` for an output [N, C, S]: a tensor of the layer's `shape`."""
    if layout == "tokens":
        return y.reshape(shape) if flat else y.transpose(1, 2)
    if not flat:
        return y.reshape(shape)
    return y.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _spread(name: str, tensor: Tensor, space: int, groups: int) -> Tensor:
    """A tensor of its space's shape as [N, G, K, S], with 1 for missing axes; half precision as float32."""
    rank = bool(space & N) + bool(space & C) + bool(space & S)
    if tensor.ndim != rank or not tensor.is_floating_point():
        about = f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        raise UserError(about, f"a floating-point tensor of rank {rank} over {axes_text(space)}")
    shape = [*tensor.shape]
    at = int(bool(space & N))
    if space & K:
        if groups < 1 or shape[at] % groups:
            raise UserError(groups, f"a number of groups that divides the {shape[at]} channels of {name}")
        shape[at : at + 1] = [groups, shape[at] // groups]
    else:
        shape[at : at + bool(space & G)] = [shape[at] if space & G else 1, 1]
    shape = [*([] if space & N else [1]), *shape, *([] if space & S else [1])]
    return tensor.float().reshape(shape) if tensor.dtype in _HALVES else tensor.reshape(shape)


def _joined(tensor: Tensor, space: int) -> Tensor:
    """[N, G, K, S] as the shape of the space."""
    n, g, k, s = tensor.shape
    return tensor.reshape([*([n] if space & N else []), *([g * k] if space & C else []), *([s] if space & S else [])])


def _sizes(spaces: Mapping[str, int], tensors: Mapping[str, Tensor]) -> dict[int, int]:
    """The size of every axis, from x. Errors: UserError for an input of other sizes."""
    sizes = {axis: tensors["x"].shape[dim] for axis, dim in _DIMS.items()}
    for name, tensor in tensors.items():
        for axis, dim in _DIMS.items():
            if spaces[name] & axis and tensor.shape[dim] != sizes[axis]:
                about = f"{axes_text(axis)} = {tensor.shape[dim]} of {name}"
                raise UserError(about, f"{axes_text(axis)} = {sizes[axis]} as in x")
    return sizes


def _dims(axes: int) -> list[int]:
    return [dim for axis, dim in _DIMS.items() if axes & axis]


def _product(sizes) -> float:
    count = 1
    for size in sizes:  # symbolic under export
        count = count * size
    return count


def _tensor(value: Value, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((1, 1, 1, 1), value)


_PLAIN = frozenset(("add", "sub", "mul", "div", "guard", "lt", "le", "eq"))  # take numbers beside a tensor
ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "square": torch.square,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "softplus": torch.nn.functional.softplus,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "i0e": torch.special.i0e,
    "i1e": torch.special.i1e,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": torch.pow,
    "max": torch.maximum,
    "min": torch.minimum,
    "guard": lambda b, e: torch.where(b < 0, b - e, b + e),
    "clamp_max": lambda a, c: torch.clamp(a, max=c),
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "where": torch.where,
}
