"""The handwritten layers where there is no GPU: eager branch, operators, transformations, errors."""

from __future__ import annotations

import subprocess
import sys

import handwritten_cases as cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import kernels.handwritten as hand
from search_spaces.common.errors import UserError

ops = torch.ops.nasforge


def check(case: cases.Case, dtype: torch.dtype, **more) -> None:
    for name, error, bound in cases.errors(case, dtype, **more):
        assert error <= bound, name


LONG = [pytest.param(case, marks=pytest.mark.slow) for case in cases.long_cases()]  # eager code knows no lengths
EAGER = [*cases.base_cases(), *cases.trap_cases(), *LONG]


@pytest.mark.parametrize("case", EAGER, ids=lambda c: c.name)
def test_eager_branch_equals_torch(case):
    check(case, torch.float64)
    check(case, torch.float32)


@pytest.mark.parametrize("case", [*cases.activation_cases()], ids=lambda c: c.name)
def test_activations_and_their_derivatives(case):
    check(case, torch.float64)


@pytest.mark.parametrize("case", [*cases.half(cases.base_cases())][::3], ids=lambda c: c.name)
def test_eager_branch_in_half_precision(case):
    check(case, torch.float16)
    check(case, torch.bfloat16, expanded=True)


def leaf(*shape: int, last: bool = False) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return x.requires_grad_()


OPERATORS = {
    "batch": (ops.plane_norm, (leaf(3, 8, 4, 4), leaf(3, 8, 4, 4), leaf(8), leaf(8), None, None, 0, 1e-5, "silu", 0.0)),
    "group-last": (
        ops.plane_norm,
        (leaf(3, 8, 4, 4, last=True), None, leaf(8), None, None, None, 2, 1e-5, "relu", 0.0),
    ),
    "eval": (
        ops.plane_norm,
        (leaf(3, 8, 4), leaf(3, 8, 4), None, leaf(8), torch.zeros(8), torch.ones(8), 0, 1e-5, "identity", 0.0),
    ),
    "layer": (ops.row_norm, (leaf(3, 4, 8), None, leaf(8), leaf(8), True, 1e-5, "gelu", 0.0)),
    "rms-residual": (ops.row_norm, (leaf(3, 4, 8), leaf(3, 4, 8), leaf(8), None, False, 1e-5, "identity", 0.0)),
    "gate-packed": (ops.gated, (leaf(3, 8, 4, 4, last=True), None, 1, "silu", 0.0)),
    "gate": (ops.gated, (leaf(3, 8), leaf(3, 8), 1, "powlu-gate", 3.0)),
    "poly": (ops.poly_norm, (leaf(3, 4, 8), leaf(3, 4, 8), leaf(3), leaf(1), 1e-6)),
}


QUICK = ("group-last", "layer", "gate-packed", "poly")  # one of each operator


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OPERATORS]
)
def test_operator_declares_what_it_does(name):
    operator, arguments = OPERATORS[name]
    opcheck(operator.default, arguments)


class Net(nn.Module):
    """Every family once, between ordinary layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(8)
        self.weight, self.bias = nn.Parameter(torch.full((3,), 1 / 3)), nn.Parameter(torch.zeros(1))
        self.linear = nn.Linear(8, 16)

    def forward(self, x):
        x = self.conv(x)
        norm = (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)
        y = hand.batch_norm_act(x, *norm, training=self.training, act="relu", residual=x)
        y = hand.group_norm_act(y, 2, self.group.weight, self.group.bias, act="silu")
        t = y.flatten(2).transpose(1, 2)
        t, total = hand.layer_norm_act(t, self.layer.weight, self.layer.bias, residual=t)
        t = hand.swiglu(self.linear(t)) * total
        return hand.poly_norm(t, self.weight, self.bias).mean((1, 2))

    def plain(self, x):
        x = self.conv(x)
        y = F.silu(self.group(F.relu(self.norm(x) + x)))
        t = y.flatten(2).transpose(1, 2)
        total = t + t
        a, b = self.linear(self.layer(total)).chunk(2, -1)
        t = F.silu(a) * b * total
        powers = [u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-6) for u in (t**3, t**2, t)]
        return (sum(w * p for w, p in zip(self.weight, powers)) + self.bias).mean((1, 2))


def nets() -> tuple[Net, Net]:
    torch.manual_seed(0)
    a, b = Net(), Net()
    b.load_state_dict(a.state_dict())
    return a, b


def same_training(a, b, run, x, tolerance=1e-5) -> None:
    """Values, gradients and running statistics of `run(a)` and of b's plain forward."""
    y, z = run(x), b.plain(x)
    torch.testing.assert_close(y, z, atol=tolerance, rtol=tolerance)
    y.square().sum().backward()
    z.square().sum().backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=10 * tolerance, rtol=10 * tolerance, msg=name)
    torch.testing.assert_close(a.norm.running_mean, b.norm.running_mean)
    torch.testing.assert_close(a.norm.running_var, b.norm.running_var)


def test_trains_like_torch_layers():
    a, b = nets()
    same_training(a, b, a, torch.randn(4, 3, 5, 5))
    torch.testing.assert_close(a.eval()(torch.ones(2, 3, 5, 5)), b.eval().plain(torch.ones(2, 3, 5, 5)))


def test_compiles_as_one_graph_with_dynamic_shapes():
    a, b = nets()
    compiled = torch.compile(a, fullgraph=True, backend="aot_eager", dynamic=True)
    same_training(a, b, compiled, torch.randn(4, 3, 5, 5))
    x = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(compiled(x), b.plain(x), atol=1e-5, rtol=1e-5)


def test_export_leaves_torch_operations(tmp_path):
    a, b = nets()
    x = torch.randn(4, 3, 5, 5)
    program = torch.export.export(a.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert "nasforge" not in str(program.graph)
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    y = torch.randn(3, 3, 5, 5)
    torch.testing.assert_close(loaded(y), b.eval().plain(y), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_onnx_by_the_eager_branch(importable, tmp_path):
    runtime = importable("onnxruntime")
    importable("onnxscript")
    a, b = nets()
    batch = ({0: torch.export.Dim("n", min=2)},)
    program = torch.onnx.export(a.eval(), (torch.randn(4, 3, 5, 5),), dynamo=True, dynamic_shapes=batch, verbose=False)
    program.save(tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    x = torch.randn(3, 3, 5, 5)
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(y), b.eval().plain(x), atol=1e-5, rtol=1e-5)


def test_checkpoint_computes_again():
    a, b = nets()
    a.norm.momentum = b.norm.momentum = 0.0  # running statistics are updated twice, as torch's are
    a.norm.running_mean.zero_()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    loss = checkpoint(a, x, use_reentrant=False).square().sum()
    gradient = torch.autograd.grad(loss, x)[0]
    expected = torch.autograd.grad(b.plain(x).square().sum(), x)[0]
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_autocast_leaves_types_alone():
    a, b = nets()
    x = torch.randn(4, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hand.group_norm_act(a.conv(x), 2, a.group.weight, a.group.bias, act="silu")
        assert y.dtype == torch.bfloat16
        loss = a(x).float().square().sum()
    loss.backward()
    exact = b.plain(x).square().sum()
    exact.backward()
    assert a.conv.weight.grad.dtype == torch.float32
    assert a.group.weight.grad.dtype == torch.float32
    assert F.cosine_similarity(a.conv.weight.grad.flatten(), b.conv.weight.grad.flatten(), 0) > 0.99


def test_layout_is_kept_and_second_derivatives_are_refused():
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = hand.group_norm_act(x, 2)
    assert y.stride() == x.stride()
    gradient = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    assert gradient.stride() == x.stride()
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.square().sum().backward()


def test_gradient_into_the_sum_alone():
    x, r = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    _, total = hand.layer_norm_act(x, residual=r)
    (total * 3.0).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 8), 3.0))
    assert torch.equal(r.grad, torch.full((3, 8), 3.0))


def test_empty_batches_and_single_values():
    assert hand.layer_norm_act(torch.randn(0, 8), torch.ones(8)).shape == (0, 8)
    assert hand.swiglu(torch.randn(0, 8)).shape == (0, 4)
    assert hand.group_norm_act(torch.randn(0, 8, 4, 4), 2).shape == (0, 8, 4, 4)
    assert hand.poly_norm(torch.randn(0, 8), torch.ones(3), torch.ones(1)).shape == (0, 8)
    mean, var = torch.zeros(8), torch.ones(8)
    assert hand.batch_norm_act(torch.randn(0, 8, 4, 4), mean, var, act="relu").shape == (0, 8, 4, 4)
    with pytest.raises(UserError, match="more than one value per channel"):
        hand.batch_norm_act(torch.randn(1, 8, 1, 1), training=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: hand.layer_norm_act(x.int()),
        lambda x: hand.layer_norm_act(x.to(torch.complex64)),
        lambda x: hand.layer_norm_act(x.to_sparse()),
        lambda x: hand.layer_norm_act(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        lambda x: hand.layer_norm_act(x, torch.ones(7)),
        lambda x: hand.rms_norm_act(x, residual=torch.ones(8)),
        lambda x: hand.batch_norm_act(x, torch.zeros(3), torch.ones(8)),
        lambda x: hand.group_norm_act(x, 3),
        lambda x: hand.group_norm_act(x, 0),
        lambda x: hand.layer_norm_act(x, act="silo"),
        lambda x: hand.swiglu(x[:, :7]),
        lambda x: hand.poly_norm(x, torch.ones(2), torch.ones(1)),
        lambda x: hand.sign_words(x.repeat(20, 1)),
        lambda x: hand.sign_words(x.int()),
    ],
)
def test_bad_input_is_named(call):
    with pytest.raises(UserError):
        call(torch.randn(4, 8))


def test_suggestions():
    with pytest.raises(UserError, match="silu"):
        hand.layer_norm_act(torch.randn(4, 8), act="sillu")
    with pytest.raises(UserError, match="'4'"):
        hand.group_norm_act(torch.randn(4, 8), 5)


def test_signs_against_counting():
    x = torch.randn(64, 3, 5, generator=torch.Generator().manual_seed(0))
    words = hand.sign_words(x)
    bits = torch.tensor([[(int(word) >> b) & 1 for word in words] for b in range(64)])
    assert torch.equal(bits.bool(), x.flatten(1) > 0)
    expected = [[int((p == q).sum()) for q in bits] for p in bits]
    assert hand.sign_agreement(x).tolist() == expected
    assert hand.sign_agreement(torch.randn(200, 4)).diagonal().tolist() == [4] * 200


def test_runs_without_triton_and_without_importing_it():
    code = (
        "import sys, torch, kernels.handwritten as hand\n"
        "from kernels import backend\n"
        "hand.swiglu(torch.ones(2, 4))\n"
        "print('triton' in sys.modules)\n"
        "sys.modules['triton'] = None\n"
        "backend.HAVE_TRITON = False\n"
        "x = torch.randn(3, 8, 4, 4, requires_grad=True)\n"
        "y = hand.group_norm_act(x, 2, act='silu')\n"
        "y.square().sum().backward()\n"
        "print(torch.allclose(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)), atol=1e-6))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
