"""Handwritten kernels against torch's own layers in float64 under autograd: cases for the eager branch, the
interpreter and GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.handwritten as hand
from search_spaces.primitives.activation_families import PolyNorm
from search_spaces.primitives.gates import powlu_gate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky-relu": F.leaky_relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda z: F.gelu(z, approximate="tanh"),
    "hardswish": F.hardswish,
    "mish": F.mish,
    "powlu-gate": powlu_gate,
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LOOSEST = 2e-3  # of the bounds by torch's own error


@dataclass(frozen=True)
class Case:
    """One layer on one shape. data: how many of the tensors have the shape and type of x; the others are parameters.

    kind: normal, or a trap of `draw`. last: channels_last. sliced: every second element of a larger tensor.
    """

    name: str
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    shape: tuple[int, ...]
    parameters: tuple[tuple[int, ...], ...] = ()
    data: int = 1
    kind: str = "normal"
    last: bool = False
    sliced: bool = False

    def draw(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        tensors = []
        for index in range(self.data):
            x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
            if index == 0 and self.kind == "shifted":
                x = x + 1000.0
            elif index == 0 and self.kind == "constant":
                x = torch.full_like(x, 1.5)
            elif index == 0 and self.kind == "spike":
                x.view(-1)[3] = 3000.0
            elif index == 0 and self.kind == "zero-channel":
                x[:, 1] = 0.0
            elif index == 0 and self.kind in ("nan", "inf"):
                x.view(-1)[5] = float(self.kind)
            x = x.to(dtype)
            if self.last:
                x = x.contiguous(memory_format=torch.channels_last)
            if self.sliced:
                x = torch.stack((x, x), -1)[..., 1]
            tensors.append(x)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return tensors + [1.0 + 0.5 * torch.randn(n, generator=generator).to(wide) for n in self.parameters]


def outputs_and_gradients(function: Callable, tensors: list[Tensor], expanded: bool = False) -> list[Tensor]:
    """The outputs, then the gradients of a fixed random combination of them (of their sum if expanded)."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    total = outputs[0].new_zeros(())
    for y in outputs:
        # The gradient in is the cotangent itself, in the type of y, so that both sides see the same one.
        cotangent = torch.randn(y.shape, generator=generator).to(torch.bfloat16)
        total = total + (y.sum() if expanded else (y * cotangent.to(y.device, y.dtype)).sum())
    return [y.detach() for y in outputs] + list(torch.autograd.grad(total, leaves))


def distance(a: Tensor, b: Tensor) -> float:
    """The norm of a - b over that of b, where b is finite; infinite if NaN and infinities differ.

    Values are of the order of 1: against a b whose true value is nearly 0 the error counts as if b were 1/32.
    """
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return math.inf
    keep = b.isfinite()
    return float((a - b)[keep].norm() / max(b[keep].norm().item(), keep.sum().item() ** 0.5 / 32.0, 1e-30))


def errors(
    case: Case, dtype: torch.dtype, device: str = "cpu", expanded: bool = False
) -> list[tuple[str, float, float]]:
    """(case and quantity, error, bound). The bound is 8 times torch's own float32 error where that is larger."""
    tensors = case.draw(dtype)
    ours = outputs_and_gradients(case.ours, [t.to(device) for t in tensors], expanded)
    exact = outputs_and_gradients(case.reference, [t.double() for t in tensors], expanded)
    torchs = outputs_and_gradients(case.reference, [t.float() for t in tensors], expanded)
    found = []
    for index, (a, b, c) in enumerate(zip(ours, exact, torchs, strict=True)):
        bound = TOLERANCE[dtype]
        if dtype != torch.float64:
            bound = max(bound, min(8.0 * distance(c, b), LOOSEST))
        found.append((f"{case.name} {case.kind} {dtype} [{index}]", distance(a, b), bound))
    return found


def batch(act: str, training: bool, residual: bool) -> tuple[Callable, Callable]:
    def ours(x, *rest):
        *r, w, b, m, v = rest
        given = (m.detach(), v.detach().abs()) if not training else (None, None)
        y = hand.batch_norm_act(x, *given, w, b, training=training, act=act, residual=r[0] if residual else None)
        return y + 0.0 * (m.sum() + v.sum()).to(y.dtype)

    def reference(x, *rest):
        *r, w, b, m, v = rest
        given = (m.detach(), v.detach().abs()) if not training else (None, None)
        z = F.batch_norm(x, *given, w.to(x.dtype), b.to(x.dtype), training=training or not given)
        return ACTIVATIONS[act](z + r[0] if residual else z) + 0.0 * (m.sum() + v.sum())

    return ours, reference


def group(groups: int, act: str, residual: bool) -> tuple[Callable, Callable]:
    def ours(x, *rest):
        *r, w, b = rest
        return hand.group_norm_act(x, groups, w, b, act=act, residual=r[0] if residual else None)

    def reference(x, *rest):
        *r, w, b = rest
        z = F.group_norm(x, groups, w, b)
        return ACTIVATIONS[act](z + r[0] if residual else z)

    return ours, reference


def row(centred: bool, act: str, residual: bool) -> tuple[Callable, Callable]:
    def ours(x, *rest):
        *r, w, b = rest
        function = hand.layer_norm_act if centred else hand.rms_norm_act
        return function(x, w, b, act=act, eps=1e-5, residual=r[0] if residual else None)

    def reference(x, *rest):
        *r, w, b = rest
        h = x + r[0] if residual else x
        z = F.layer_norm(h, w.shape, w, b) if centred else F.rms_norm(h, w.shape, w, 1e-5) + b
        return (ACTIVATIONS[act](z), h) if residual else ACTIVATIONS[act](z)

    return ours, reference


def gate(act: str, dim: int, packed: bool) -> tuple[Callable, Callable]:
    def ours(x, *value):
        return hand.gated(x, *value, act=act, dim=dim)

    def reference(x, *value):
        a, b = x.chunk(2, dim) if packed else (x, value[0])
        return ACTIVATIONS[act](a) * b

    return ours, reference


def poly(value: bool) -> tuple[Callable, Callable]:
    def ours(x, *rest):
        *v, w, b = rest
        return hand.poly_norm(x, w, b, value=v[0] if value else None)

    def reference(x, *rest):
        *v, w, b = rest
        module = PolyNorm(channel_dim=-1).to(x.dtype)
        y = torch.func.functional_call(module, {"weight": w.to(x.dtype), "bias": b.to(x.dtype)}, (x,))
        return y * v[0] if value else y

    return ours, reference


def batch_case(shape, act="relu", training=True, residual=False, **more) -> Case:
    name = f"batch {act} {'train' if training else 'eval'} {'residual' if residual else ''} {shape}"
    c = (shape[1],)
    return Case(name, *batch(act, training, residual), shape, (c, c, c, c), 2 if residual else 1, **more)


def group_case(shape, groups, act="silu", residual=False, **more) -> Case:
    name = f"group {groups} {act} {'residual' if residual else ''} {shape}"
    c = (shape[1],)
    return Case(name, *group(groups, act, residual), shape, (c, c), 2 if residual else 1, **more)


def row_case(shape, centred=True, act="identity", residual=False, **more) -> Case:
    name = f"{'layer' if centred else 'rms'} {act} {'residual' if residual else ''} {shape}"
    c = (shape[-1],)
    return Case(name, *row(centred, act, residual), shape, (c, c), 2 if residual else 1, **more)


def gate_case(shape, act="silu", dim=-1, packed=True, **more) -> Case:
    name = f"gate {act} dim {dim} {'packed' if packed else ''} {shape}"
    return Case(name, *gate(act, dim, packed), shape, (), 1 if packed else 2, **more)


def poly_case(shape, value=False, **more) -> Case:
    return Case(f"poly {value} {shape}", *poly(value), shape, ((3,), (1,)), 2 if value else 1, **more)


def base_cases() -> Iterator[Case]:
    """Every family in every schedule and layout, odd sizes, samples and positions of one."""
    yield batch_case((3, 10, 7, 7))
    yield batch_case((3, 10, 7, 7), "silu", residual=True, last=True)
    yield batch_case((2, 5, 3, 4), "gelu", training=False)
    yield batch_case((2, 5, 3, 4), "relu", training=False, residual=True)
    yield batch_case((9, 6), "identity", residual=True)
    yield batch_case((1, 4, 33), "leaky-relu")
    yield group_case((2, 12, 7, 7), 3)
    yield group_case((2, 12, 7, 7), 12, "gelu-tanh", residual=True)
    yield group_case((1, 8, 1, 1), 2, "relu6")
    yield group_case((2, 6, 5), 1, "elu", residual=True)
    yield group_case((2, 12, 5, 5), 2, "hardswish", last=True)
    yield group_case((2, 6, 4, 4), 1, "mish", last=True, residual=True)
    yield group_case((2, 4, 8, 4), 2, sliced=True)
    yield row_case((5, 49))
    yield row_case((2, 3, 130), act="gelu", residual=True)
    yield row_case((5, 16), centred=False, act="tanh")
    yield row_case((1, 1), act="sigmoid")
    yield row_case((70, 8), centred=False, residual=True)
    yield row_case((4, 24), sliced=True)
    yield gate_case((3, 98))
    yield gate_case((2, 6, 5, 3), dim=1)
    yield gate_case((2, 6, 5, 3), "powlu-gate", dim=1, last=True)
    yield gate_case((3, 5, 7), "gelu", packed=False)
    yield gate_case((2, 6, 5, 3), "relu", dim=1, packed=False, last=True)
    yield poly_case((5, 49))
    yield poly_case((2, 2, 33), value=True)


def trap_cases() -> Iterator[Case]:
    """Mean far above the deviation, constants, a spike, a channel of zeros, NaN and infinity."""
    for kind in ("shifted", "constant", "spike", "zero-channel", "nan", "inf"):
        yield batch_case((2, 4, 3, 3), "silu", kind=kind)
        yield group_case((2, 4, 3, 3), 2, "relu", kind=kind)
        yield row_case((3, 20), kind=kind)
        yield row_case((3, 20), centred=False, act="silu", kind=kind)


def long_cases() -> Iterator[Case]:
    """Groups and rows that do not fit in registers, and positions split over programs."""
    yield group_case((1, 4, 96, 96), 2, residual=True)
    yield group_case((1, 3, 128, 80), 3, "relu")
    yield batch_case((1, 2, 64, 80), "silu", residual=True)
    yield row_case((2, 9001), act="gelu", residual=True)
    yield row_case((1, 17000), centred=False, act="silu", residual=True)
    yield row_case((1, 17000))


def activation_cases() -> Iterator[Case]:
    for act in ACTIVATIONS:
        yield gate_case((4, 66), act)
        yield group_case((2, 4, 3, 3), 2, act)


def half(cases: Iterator[Case]) -> Iterator[Case]:
    """Those that low precision is tested on: without sliced layouts, which differ in nothing there."""
    return (replace(case, kind="normal") for case in cases if not case.sliced)
