"""One operator for every layer: `nasforge::graph_forward`, with the layer's program as text, and its backward.

torch.compile, torch.export, checkpointing and dynamic shapes see one opaque node, whether Triton or the reference
executes it. The result has the type and the memory layout of x; statistics are float32 (float64 for float64). There is
no autocast rule: what comes in half precision leaves in it, while torch's own norms go to float32. Outputs alias
neither each other nor inputs. A second derivative raises; gradient penalties take unfused layers.
Statistics are those of this process: who wants those of all processes keeps the unfused layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from kernels.autodiff import Derivative, differentiate
from kernels.backend import by_kernels
from kernels.handwritten.launch import strides_of
from kernels.nodes import Unsupported, shape_of
from kernels.program import Builder, Program, parse
from kernels.reference import execute, from_program, to_program
from search_spaces.common.errors import UserError

_library = Library("nasforge", "FRAGMENT")
_log = logging.getLogger("nasforge.kernels")
_SETTINGS = "str program, str wrt, str layout, bool flat, int groups, bool reference"
_KEPT = 4096  # programs


# -- programs by their text --------------------------------------------------------------------------------------


@functools.lru_cache(_KEPT)
def input_names(text: str) -> tuple[str, ...]:
    """The inputs of a program beside x, in the order in which the operator takes their tensors."""
    return tuple(name for name in parse(text).inputs if name != "x")


@functools.lru_cache(_KEPT)
def output_count(text: str) -> int:
    """How many outputs the program has itself; the operator's further ones are saved for the backward."""
    return len(parse(text).outputs)


@functools.lru_cache(_KEPT)
def derivative(text: str, wrt: str) -> Derivative:
    """The program's derivative by the names in `wrt`, with commas between."""
    return differentiate(parse(text), wrt.split(","))


@functools.lru_cache(_KEPT)
def forward_program(text: str, wrt: str) -> Program:
    """What the operator computes: the program, with the backward's statistics if `wrt` names anything."""
    return derivative(text, wrt).forward if wrt else parse(text)


@functools.lru_cache(_KEPT)
def backward_program(text: str, wrt: str, wanted: str) -> Program:
    """The backward with the gradients of `wanted` alone, some of `wrt`."""
    whole = derivative(text, wrt).backward
    if wanted == wrt:
        return whole
    builder = Builder()
    ids: list[int] = []
    for node in whole.nodes:
        ids.append(builder.copy(node, [ids[a] for a in node.args]))
    return builder.program({f"d{name}": ids[whole.output(f"d{name}")] for name in wanted.split(",")})


# -- execution ---------------------------------------------------------------------------------------------------


def _run(
    program: Program, x: Tensor, inputs: dict[str, Tensor], layout: str, flat: bool, groups: int, reference: bool
) -> list[Tensor]:
    """The outputs of a program on a layer's tensors; x, dy, y and dx have the layer's shape."""
    if x.numel() == 0:  # sums of nothing
        return [torch.zeros_like(output) for output in _fake(program, x, layout, flat, groups)]
    given = {**inputs, "x": to_program(x, layout, flat)}
    if "dy" in inputs:
        given["dy"] = to_program(inputs["dy"], layout, flat)
    found = None if reference or not by_kernels(x) else _by_triton(program, given, groups)
    by_torch = found is None
    if found is None:
        found = execute(program, given, groups=groups)
    taken = {t.untyped_storage().data_ptr() for t in (x, *inputs.values())} if by_torch else set()
    outputs = []
    for name, value in found.items():
        if name in ("y", "dx"):
            value, strides = from_program(value, x.shape, layout, flat), strides_of(x)
            if value.stride() != strides or value.untyped_storage().data_ptr() in taken:
                value = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(value)
        elif by_torch:  # values of the reference may be views of each other
            value = value.clone(memory_format=torch.contiguous_format)
        outputs.append(value)
    return outputs


def _by_triton(program: Program, given: dict[str, Tensor], groups: int) -> dict[str, Tensor] | None:
    """The outputs by generated kernels; None where there are none for this program and shape."""
    from triton.runtime.errors import OutOfResources

    from kernels import runtime

    try:
        return runtime.run(program, given, groups=groups)
    except (Unsupported, OutOfResources) as error:
        _warn_once(program.structural_hash, str(error))
        return None


@functools.lru_cache(_KEPT)
def _warn_once(digest: str, reason: str) -> None:
    _log.warning("a layer runs by torch operations, kernels cannot express it: %s", reason)


def _fake(program: Program, x: Tensor, layout: str, flat: bool, groups: int) -> list[Tensor]:
    """Tensors without values for the outputs of a program."""
    tokens = layout == "tokens"
    channels = x.shape[-1 if tokens else 1]
    n, s = x.shape[0], 1
    for size in x.shape[1:-1] if tokens else x.shape[2:]:
        n, s = (n * size, s) if flat else (n, s * size)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    found = []
    for name, at in program.outputs:
        if name in ("y", "dx"):
            found.append(x.new_empty_strided(x.shape, strides_of(x)))
        else:
            space = program.spaces[at]
            found.append(x.new_empty(shape_of(space, n, groups, channels // groups, s), dtype=wide))
    return found


# -- operators ---------------------------------------------------------------------------------------------------


def _forward(x, inputs, program, wrt, layout, flat, groups, reference):
    named = dict(zip(input_names(program), inputs, strict=True))
    return _run(forward_program(program, wrt), x, named, layout, flat, groups, reference)


def _forward_fake(x, inputs, program, wrt, layout, flat, groups, reference):
    return _fake(forward_program(program, wrt), x, layout, flat, groups)


def _backward(dy, x, inputs, saved, program, wrt, layout, flat, groups, reference, wanted):
    named = dict(zip(input_names(program), inputs, strict=True))
    named |= {f"saved_{k}": value for k, value in enumerate(saved)}
    return _run(
        backward_program(program, wrt, wanted),
        x,
        {**named, "dy": dy.to(x.dtype)},
        layout,
        flat,
        groups,
        reference,
    )


def _backward_fake(dy, x, inputs, saved, program, wrt, layout, flat, groups, reference, wanted):
    return _fake(backward_program(program, wrt, wanted), x, layout, flat, groups)


def _define(schema: str, run, fake) -> None:
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    register_fake(f"nasforge::{name}", fake, lib=_library)


_define(f"graph_forward(Tensor x, Tensor[] inputs, {_SETTINGS}) -> Tensor[]", _forward, _forward_fake)
_define(
    f"graph_backward(Tensor dy, Tensor x, Tensor[] inputs, Tensor[] saved, {_SETTINGS}, str wanted) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup(ctx, inputs, output):
    x, tensors, *ctx.settings = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(x, *tensors, *output[output_count(ctx.settings[0]) :])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, gradients: Sequence[Tensor | None]):
    program, wrt = ctx.settings[:2]
    names = input_names(program)
    none = (None,) * len(ctx.settings)
    if gradients[0] is None:
        return None, [None] * ctx.count, *none
    needs = dict(zip(("x", *names), (ctx.needs_input_grad[0], *ctx.needs_input_grad[1]), strict=True))
    wanted = ",".join(name for name in ("x", *names) if needs[name])
    if missing := set(wanted.split(",")) - set(wrt.split(",")):
        raise UserError(wrt, f"names by which graph_forward is differentiated, {', '.join(sorted(missing))} too")
    wanted = ",".join(name for name in wrt.split(",") if name in wanted.split(","))
    x, *kept = ctx.saved_tensors  # checkpoints unpack them once
    tensors, saved = kept[: ctx.count], kept[ctx.count :]
    found = torch.ops.nasforge.graph_backward(gradients[0], x, tensors, saved, *ctx.settings, wanted)
    by_name = dict(zip(wanted.split(","), found, strict=True))
    into = [
        by_name[name].to(tensor.dtype) if name in by_name else None for name, tensor in zip(names, tensors, strict=True)
    ]
    return by_name.get("x"), into, *none


register_autograd("nasforge::graph_forward", _autograd, setup_context=_setup, lib=_library)


def _twice(ctx, *gradients):
    # Without a formula torch would only warn, and leave the gradient's gradient out.
    raise RuntimeError("fused layers have no second derivatives; `kernels.unfuse` the model or use backend='eager'")


register_autograd("nasforge::graph_backward", _twice, lib=_library)
