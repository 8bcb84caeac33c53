"""Numbers and layouts that break careless kernels, drawn by hypothesis: fused modules against float64.

As a script it runs them by Triton's interpreter, in a process with TRITON_INTERPRET=1:

    TRITON_INTERPRET=1 python tests/support/trapped_layers.py EXAMPLES

How far a module may be off follows from what it is given: as far as the exact result moves when every number of x
moves by two units in its last place, or 8 times what the module itself is off in float32, beside a share of its norm.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from unittest import mock

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kernels
from kernels import operators
from search_spaces.layers import catalog
from search_spaces.layers.module import GraphLayer

TOLERANCES = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 9e-3}
LAYERS = ("batch-norm", "gn-silu", "evonorm-b0", "evonorm-s0", "layer-norm", "instance-norm", "layer-norm-tokens")
NORMS = ("torch batch", "torch group", "torch layer")  # modules of torch, so handwritten kernels
POSITIONS = ((), (1,), (5,), (4, 4), (7, 7), (3, 65))
KINDS = ("normal", "mean far above the deviation", "constant channels", "zeros", "a spike", "tiny", "the range of half")
FORMS = ("contiguous", "channels last", "sliced", "permuted")


@dataclass(frozen=True)
class Trap:
    """A module's name, x with its type and layout, and the layout in which its gradient arrives."""

    module: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    form: str
    gradient: str
    strange: float | None  # a number that is none, somewhere
    training: bool
    seed: int

    def make(self) -> nn.Module:
        """The module with parameters away from their initial values."""
        channels = self.shape[1]
        groups = 2 if channels % 2 == 0 else 1
        if self.module in LAYERS:
            model: nn.Module = GraphLayer(catalog.layer(self.module, groups=groups), channels)
        else:
            batch = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[len(self.shape) - 2]
            norms = (batch(channels), nn.GroupNorm(groups, channels), nn.LayerNorm(self.shape[-1]))
            model = nn.Sequential(norms[NORMS.index(self.module)], nn.SiLU())
        generator = torch.Generator().manual_seed(self.seed)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.4, 1.2, generator=generator)
        return model.train(self.training)

    def numbers(self, generator: torch.Generator) -> Tensor:
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        size = float(10 ** torch.randint(1, 5, (), generator=generator))
        if self.kind == "mean far above the deviation":
            x = x + size
        elif self.kind == "constant channels":
            x[:, ::2] = size / 3
        elif self.kind == "zeros":
            x = x * 0.0
        elif self.kind == "a spike":
            x.view(-1)[x.numel() // 2] = size
        elif self.kind == "tiny":
            x = x * 1e-12
        elif self.kind == "the range of half":
            x = x.clamp(-3, 3) * 2e4
        if self.strange is not None:
            x.view(-1)[x.numel() // 3] = self.strange
        return x.to(self.dtype)

    def draw(self) -> tuple[Tensor, Tensor]:
        """x and the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        x, dy = self.numbers(generator), torch.randn(self.shape, generator=generator).to(self.dtype)
        if self.gradient == "expanded":
            dy = dy.flatten()[0].expand(self.shape)
        return arranged(x, self.form), dy if self.gradient == "expanded" else arranged(dy, self.gradient)


def arranged(x: Tensor, form: str) -> Tensor:
    """The same numbers with other strides."""
    if form == "channels last" and x.ndim > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if form == "sliced":
        return torch.stack([x + 1, x], -1)[..., 1]
    return x.transpose(0, -1).contiguous().transpose(0, -1) if form == "permuted" else x


@st.composite
def traps(draw: st.DrawFn, *, strange: bool = False) -> Trap:
    """strange: with a NaN or an infinity."""
    module = draw(st.sampled_from(LAYERS + NORMS))
    channels = draw(st.sampled_from((1, 2, 3, 6, 8, 10)))
    shape = (draw(st.sampled_from((3, 1, 2))), channels, *draw(st.sampled_from(POSITIONS)))
    if module in ("torch batch", "torch group") and shape[0] == 1:  # torch refuses statistics of one number
        shape = (4, *shape[1:])
    number = draw(st.sampled_from((float("nan"), float("inf"), -float("inf")))) if strange else None
    kind = "normal" if strange else draw(st.sampled_from(KINDS))
    dtype = torch.float32 if strange else draw(st.sampled_from((torch.float32, torch.float32, *TOLERANCES)))
    forms = (draw(st.sampled_from(FORMS)), draw(st.sampled_from((*FORMS, "expanded"))))
    training = draw(st.sampled_from((True, True, False)))
    return Trap(module, kind, shape, dtype, *forms, number, training, draw(st.integers(0, 99)))


def run(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, gradients and buffers."""
    given = x.detach().requires_grad_()
    y = model(given)
    names = dict(model.named_parameters())
    found = torch.autograd.grad(y, [given, *names.values()], dy, allow_unused=True)
    gradients = {f"d{name}": g for name, g in zip(("x", *names), found, strict=True) if g is not None}
    return {"y": y.detach(), **gradients, **{name: b for name, b in model.named_buffers() if b.is_floating_point()}}


def check(trap: Trap, backend: str) -> None:
    """A fused module is as exact as its type allows, and fused it is."""
    model, (x, dy) = trap.make(), trap.draw()
    exact = [copy.deepcopy(model).double() for _ in range(2)]
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(trap.seed)).double() * 2 - 1
    fused = kernels.fuse(model, backend=backend)
    assert fused.count == 1
    with mock.patch.object(operators, "_warn_once", side_effect=AssertionError("it fell back to torch")):
        found = run(fused.model, x, dy)
    assert found["y"].dtype == found["dx"].dtype == trap.dtype
    wanted = run(exact[0], x.double(), dy.double())
    moved = run(exact[1], x.double() * (1 + 2.0**-22 * signs), dy.double())
    rough = run(copy.deepcopy(model), x.float(), dy.float())
    largest = max(float(value.norm()) for value in wanted.values())
    # Gradients of constants vanish by subtraction; what is left is divided by the root of an eps, 1e-5.
    vanishing = 0.0 if wanted["dx"].norm() > 0.01 * dy.norm() else 2.0**-22 / 1e-5**0.5 * float(dy.norm())
    for name, want in wanted.items():
        got = found[name].double()
        usable = want.abs() < (6e4 if trap.dtype == torch.float16 and name in ("y", "dx") else 1e37)
        tolerance = TOLERANCES[trap.dtype if name in ("y", "dx") else torch.float32]
        allowed = tolerance * (want[usable].norm() + 0.1 * largest) + 4 * (moved[name] - want)[usable].norm()
        allowed = allowed + 8 * (rough[name].double() - want)[usable].norm()
        allowed = allowed + vanishing * (name == "dx")
        assert (got - want)[usable].norm() <= allowed, (name, got, want)


def check_strange(trap: Trap, backend: str) -> None:
    """NaN and infinities come out where the module itself has them."""
    model, (x, dy) = trap.make(), trap.draw()
    eager = run(copy.deepcopy(model), x, dy)
    found = run(kernels.fuse(model, backend=backend).model, x, dy)
    for name in eager.keys() & {"y", *dict(model.named_buffers())}:
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found[name]), kind(eager[name])), (name, found[name], eager[name])


def check_many(examples: int, backend: str) -> None:
    """So many traps, and half as many with numbers that are none, the same every time."""
    common = settings(
        deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False
    )
    settings(common, max_examples=examples)(given(traps())(lambda trap: check(trap, backend)))()
    settings(common, max_examples=examples // 2)(
        given(traps(strange=True))(lambda trap: check_strange(trap, backend))
    )()


if __name__ == "__main__":
    from interpreting import prepare

    prepare()
    check_many(int(sys.argv[1]), "triton")
    print("traps hold")
