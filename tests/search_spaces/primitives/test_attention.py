"""Attentions against quadratic sums written out token by token, and their cost by counting elements."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from search_spaces.common.errors import UserError
from search_spaces.primitives import attention, gated_linear_attention, linear_attention
from search_spaces.primitives.attention import SOFT, SoftmaxAttention, newton_inverse
from search_spaces.primitives.gated_linear_attention import FORMS, GatedLinearAttention
from search_spaces.primitives.linear_attention import SLA, DiagAttention, NormAttention, NormAwareAttention

PRIMITIVES = (*attention.PRIMITIVES, *linear_attention.PRIMITIVES, *gated_linear_attention.PRIMITIVES)
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def seeded(make, *, tokens: int = 16, channels: int = 8):
    """A module in float64 with all parameters random, and tokens [2, N, C]."""
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return module, torch.randn(2, tokens, channels, dtype=torch.float64)


def heads_of(x: torch.Tensor, linear: nn.Linear, heads: int, part: int = 0, parts: int = 1) -> torch.Tensor:
    """[B, heads, N, D] of one of the `parts` that `linear` makes."""
    size = linear.out_features // parts
    rows = slice(part * size, (part + 1) * size)
    y = x @ linear.weight[rows].T
    if linear.bias is not None:
        y = y + linear.bias[rows]
    return torch.stack(y.split(size // heads, -1), 1)


def joined(y: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(y.unbind(1)), -1)


def depthwise(v: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Tokens [..., N, D] of a square grid, convolved with kernel [D, k, k] by shifting."""
    side, reach = math.isqrt(v.shape[-2]), kernel.shape[-1] // 2
    grid = v.unflatten(-2, (side, side))
    y = torch.zeros_like(grid) + bias
    for i in range(side):
        for j in range(side):
            for r in range(max(0, i - reach), min(side, i + reach + 1)):
                for c in range(max(0, j - reach), min(side, j + reach + 1)):
                    y[..., i, j, :] += grid[..., r, c, :] * kernel[:, r - i + reach, c - j + reach]
    return y.flatten(-3, -2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_softmax_attention(heads, causal):
    module, x = seeded(lambda: SoftmaxAttention(8, heads=heads, causal=causal))
    q, k, v = (heads_of(x, module.qkv, heads, i, 3) for i in range(3))
    scores = torch.exp(torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(8 / heads))
    scores = scores.tril() if causal else scores
    y = torch.einsum("bhij,bhjd->bhid", scores / scores.sum(-1, keepdim=True), v)
    torch.testing.assert_close(module(x), module.project(joined(y)), **CLOSE)


def test_softmax_attention_is_that_of_torch():
    torch.manual_seed(0)
    module, other = SoftmaxAttention(8, heads=2), nn.MultiheadAttention(8, 2, batch_first=True)
    other.in_proj_weight.data, other.in_proj_bias.data = module.qkv.weight.data, module.qkv.bias.data
    other.out_proj.load_state_dict(module.project.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(module(x), other(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_newton_inverse_of_well_conditioned_matrices_is_the_inverse():
    torch.manual_seed(0)
    a = torch.rand(3, 6, 6, dtype=torch.float64) * 0.05
    matrix = a + a.mT + torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.inv(matrix + 0.01 * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(newton_inverse(matrix), expected, rtol=1e-8, atol=1e-8)


def test_newton_inverse_has_the_stated_error_for_every_eigenvalue():
    torch.manual_seed(0)
    points = torch.randn(12, 2, dtype=torch.float64)
    matrix = torch.exp(-0.5 * torch.cdist(points, points).square())  # badly conditioned
    p = matrix + 0.01 * torch.eye(12, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(p)
    alpha = 1.8 / float(matrix.sum(-1).max()) ** 2
    for iterations in (3, 20):
        reached = (1 - (1 - alpha * values**2) ** (2**iterations)) / values
        expected = vectors @ torch.diag(reached) @ vectors.T
        torch.testing.assert_close(newton_inverse(matrix, iterations), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2])
def test_soft(heads):
    module, x = seeded(lambda: SOFT(8, heads=heads, ratio=2, iterations=60))
    size = 8 // heads
    q, v = heads_of(x, module.query, heads) / size**0.25, heads_of(x, module.value, heads)
    windows = q.unflatten(2, (2, 2, 2, 2)).permute(0, 1, 2, 4, 3, 5, 6)  # [B, h, row, column, r, c, D]
    marks = torch.einsum("bhijrcd,odrc->bhijo", windows, module.landmarks.weight).flatten(2, 3)
    marks = F.gelu(F.layer_norm(marks, (size,), module.norm.weight, module.norm.bias))
    e = torch.exp(-(q.unsqueeze(3) - marks.unsqueeze(2)).square().sum(-1) / 2)
    a = torch.exp(-(marks.unsqueeze(3) - marks.unsqueeze(2)).square().sum(-1) / 2)
    y = e @ torch.linalg.inv(a + 0.01 * torch.eye(4, dtype=x.dtype)) @ e.mT @ v
    local = [depthwise(v[:, h], module.local.weight[h].expand(size, 3, 3), 0) for h in range(heads)]
    expected = module.project(joined(y + torch.stack(local, 1)))
    torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-7)


def test_soft_with_every_token_a_landmark_nears_the_gaussian_kernel():
    torch.manual_seed(0)
    q = torch.randn(16, 8, dtype=torch.float64) * 2
    kernel = attention.gaussian_scores(q, q)
    torch.testing.assert_close(kernel, torch.exp(-0.5 * torch.cdist(q, q).square()))
    near = kernel @ newton_inverse(kernel, 40) @ kernel
    torch.testing.assert_close(near, kernel, rtol=0.0, atol=0.02)


@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_sla(heads, position):
    module, x = seeded(lambda: SLA(8, heads=heads, tokens=16 if position else None))
    q, k, v = (heads_of(x, module.qkv, heads, i, 3) for i in range(3))
    if position:
        k = k + torch.stack(module.position.split(8 // heads, -1), 1)
    scores = torch.einsum("bhid,bhjd->bhij", q.clamp_min(0), k.clamp_min(0))
    y = (scores / (scores.sum(-1, keepdim=True) + 1e-6)) @ v
    y = y + depthwise(v, module.local.weight[:, 0], module.local.bias)
    torch.testing.assert_close(module(x), module.project(joined(y)), **CLOSE)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Tokens [..., N, D] of a square grid, pairs of channels turned as complex numbers."""
    side, size = math.isqrt(x.shape[-2]), x.shape[-1]
    count = size // 4
    frequency = torch.tensor([10000 ** -(i / max(count - 1, 1)) for i in range(count)], dtype=x.dtype)
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    angle = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], -1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_norm_aware_attention(heads, rotary):
    module, x = seeded(lambda: NormAwareAttention(16, heads=heads, rotary=rotary), channels=16)
    q, k, v, gate = (heads_of(x, module.qkvg, heads, i, 4) for i in range(4))
    norm = q.square().sum(-1, keepdim=True).sqrt()
    power = 1.5 + 3 * torch.tanh(norm)
    q_parts = [(s * q / norm).clamp_min(0).pow(power) for s in (1, -1)]
    k_parts = [(s * k).clamp_min(0).pow(3) for s in (1, -1)]
    scores = sum(a @ b.mT for a, b in zip(q_parts, k_parts))
    weights = sum(turned(a) @ turned(b).mT for a, b in zip(q_parts, k_parts)) if rotary else scores
    y = joined(weights @ v / (scores.sum(-1, keepdim=True) + 1e-6 * 16))
    y = y + depthwise(joined(v), module.local.weight[:, 0], module.local.bias)
    y = F.layer_norm(y, (16,), module.norm.weight, module.norm.bias) * F.silu(joined(gate))
    torch.testing.assert_close(module(x), module.project(y), rtol=1e-6, atol=1e-7)


def test_norm_aware_features_sharpen_with_the_norm_of_the_query():
    q = torch.tensor([[1.0, 0.5]])
    ratio = []
    for norm in (0.1, 1.0, 10.0):
        features, _ = linear_attention.norm_aware_features(q * norm / q.norm(), q)
        ratio.append(float(features[0, 0] / features[0, 1]))
        assert ratio[-1] == pytest.approx(2 ** (3 * (0.5 + math.tanh(norm))), rel=1e-4)
    assert ratio == sorted(ratio)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [16, 150])
def test_norm_attention(causal, tokens):
    module, x = seeded(lambda: NormAttention(8, heads=2, causal=causal), tokens=tokens)
    q, k, v = (heads_of(x, module.qkv, 2, i, 3) for i in range(3))
    q, k = (torch.where(z > 0, 1 + z, z.exp()) for z in (q, k))
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    y = joined((scores.tril() if causal else scores) @ v)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-6) * module.norm.weight
    torch.testing.assert_close(module(x), module.project(y), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [3, 8, 11])
def test_diag_attention(causal, tokens):
    module, x = seeded(lambda: DiagAttention(8, heads=2, block=4, causal=causal), tokens=tokens)
    q, k, v = (heads_of(x, module.qkv, 2, i, 3) for i in range(3))
    seen = torch.block_diag(*[torch.ones(4, 4)] * 3)[:tokens, :tokens].bool()
    scores = (q @ k.mT / 2).masked_fill(~(seen.tril() if causal else seen), float("-inf"))
    torch.testing.assert_close(module(x), module.project(joined(scores.softmax(-1) @ v)), **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [5, 16, 40])
def test_gla_is_the_quadratic_sum_with_products_of_gates(form, tokens):
    module, x = seeded(lambda: GatedLinearAttention(8, heads=2, form=form), tokens=tokens)
    q, k, v = (heads_of(x, part, 2) for part in (module.query, module.key, module.value))
    logits = heads_of(x @ module.gate[0].weight.T, module.gate[1], 2)
    alpha = torch.sigmoid(logits) ** (1 / 16)
    y = torch.zeros_like(v)
    for i in range(tokens):
        for j in range(i + 1):
            decay = alpha[:, :, j + 1 : i + 1].prod(2)
            score = (q[:, :, i] * k[:, :, j] * decay).sum(-1, keepdim=True) / math.sqrt(2)
            y[:, :, i] += score * v[:, :, j]
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5) * module.norm.weight
    expected = (joined(y) * F.silu(x @ module.output_gate.weight.T)) @ module.project.weight.T
    torch.testing.assert_close(module(x), expected, **CLOSE)


def test_gla_forms_agree_where_quotients_of_gates_would_overflow():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 200, 4) for _ in range(3))
    log_gate = -torch.rand(2, 3, 200, 4) * 20  # the product of 200 gates is below 1e-800
    assert all(torch.isfinite(form(q, k, v, log_gate)).all() for form in FORMS.values())
    chunked, recurrent = (FORMS[name](q, k, v, log_gate) for name in ("chunked", "recurrent"))
    torch.testing.assert_close(chunked, recurrent, rtol=1e-3, atol=1e-4)
    wide = [form(q.double(), k.double(), v.double(), log_gate.double()) for form in FORMS.values()]
    torch.testing.assert_close(wide[1], wide[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(wide[2], wide[0], rtol=1e-9, atol=1e-11)


class Elements(TorchDispatchMode):
    """Counts the elements that operators put out: all of them, and the largest output."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.total += sum(sizes)
        self.largest = max([self.largest, *sizes])
        return out


def elements(module: nn.Module, tokens: int) -> Elements:
    with torch.no_grad(), Elements() as counter:
        module(torch.zeros(1, tokens, 8))
    return counter


LINEAR = {
    "sla": lambda n: SLA(8, heads=2),
    "nalaformer": lambda n: NormAwareAttention(8, heads=2),
    "transnormer-norm": lambda n: NormAttention(8, heads=2),
    "transnormer-norm, causal": lambda n: NormAttention(8, heads=2, causal=True),
    "transnormer-diag": lambda n: DiagAttention(8, heads=2, block=16),
    "gla, chunked": lambda n: GatedLinearAttention(8, heads=2),
    "gla, recurrent": lambda n: GatedLinearAttention(8, heads=2, form="recurrent"),
    "soft with 16 landmarks": lambda n: SOFT(8, heads=2, ratio=math.isqrt(n) // 4),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_attentions_produce_elements_in_proportion_to_the_tokens(name):
    small, large = elements(LINEAR[name](256), 256), elements(LINEAR[name](1024), 1024)
    assert large.total < 4.1 * small.total
    assert large.largest <= 4 * small.largest
    assert large.largest < 1024 * 1024 / 2


def test_quadratic_forms_are_seen_as_such():
    def make() -> nn.Module:
        return GatedLinearAttention(8, heads=2, form="parallel")

    small, large = elements(make(), 64), elements(make(), 256)
    assert large.total > 14 * small.total
    assert large.largest == 16 * small.largest


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda p: p.name)
def test_token_permutations_tell_which_attentions_know_places(primitive):
    """Only softmax attention and NormAttention treat tokens as a set; the others see grids, blocks or an order."""
    torch.manual_seed(0)
    module, x = primitive.make(8).double(), torch.randn(1, 144, 8, dtype=torch.float64)
    order = torch.randperm(144)
    same = torch.allclose(module(x[:, order]), module(x)[:, order], rtol=1e-6, atol=1e-8)
    assert same == (primitive.name in ("softmax-attention", "transnormer-norm"))


@pytest.mark.parametrize(
    "module",
    [SoftmaxAttention(8, causal=True), NormAttention(8, causal=True), DiagAttention(8, causal=True, block=4)]
    + [GatedLinearAttention(8, form=form) for form in FORMS],
    ids=lambda m: f"{type(m).__name__} {getattr(m, 'form', '')}",
)
def test_causal_attentions_never_look_ahead(module):
    x = torch.randn(1, 20, 8)
    changed = x.clone()
    changed[:, 13:] += 1
    y, z = module(x), module(changed)
    assert torch.equal(y[:, :13], z[:, :13]) or torch.allclose(y[:, :13], z[:, :13], atol=1e-6)
    assert not torch.allclose(y[:, 13:], z[:, 13:], atol=1e-3)


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda p: p.name)
def test_entries_build_copy_save_export_and_compile(primitive):
    torch.manual_seed(0)
    module, x = primitive.make(8), torch.randn(2, 16, 8)
    y = module(x)
    assert y.shape == x.shape
    assert primitive.kind == "mixing"
    assert primitive.layouts == ("tokens",)
    other = primitive.make(8)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(module).eval()(x), y)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), y)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(x).float(), y, rtol=0.1, atol=0.1)
    half = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda p: p.name)
def test_gradients(primitive):
    torch.manual_seed(0)
    module, x = primitive.make(4).double(), torch.randn(1, 16, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)
    for values in (torch.zeros(1, 16, 4), torch.full((1, 16, 4), 1e3), torch.randn(1, 16, 4) * 1e-8):
        z = values.requires_grad_()
        plain = copy.deepcopy(module).float()
        plain(z).sum().backward()
        assert torch.isfinite(z.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in plain.parameters())


def test_queries_of_zero_attend_to_nothing_in_norm_aware_attention():
    q = torch.zeros(3, 4, requires_grad=True)
    a, b = linear_attention.norm_aware_features(q, torch.randn(3, 4))
    assert not a.any()
    (a.sum() + b.sum()).backward()
    assert torch.isfinite(q.grad).all()


def test_bad_arguments():
    with pytest.raises(UserError, match="did you mean '4'"):
        SoftmaxAttention(12, heads=5)
    with pytest.raises(UserError, match="multiples of 4"):
        NormAwareAttention(12, heads=2)
    with pytest.raises(UserError, match="even number of channels"):
        GatedLinearAttention(7)
    with pytest.raises(UserError, match="divide the 4 channels"):
        GatedLinearAttention(8, heads=3)
    with pytest.raises(UserError, match="chunked"):
        GatedLinearAttention(8, form="blocked")
    with pytest.raises(UserError, match="at least one token"):
        DiagAttention(8, block=0)
    with pytest.raises(UserError, match="positive ratio"):
        attention.make_soft(8, ratio=0)
    for primitive in PRIMITIVES:
        with pytest.raises(UserError, match="'tokens'"):
            primitive.make(8, layout="channels-first")
        with pytest.raises(UserError, match="channels"):
            primitive.make(0)


def test_default_heads_have_64_channels():
    assert [SoftmaxAttention(c).heads for c in (32, 64, 192, 384)] == [1, 1, 3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda p: p.name)
def test_entries_compile_with_inductor(primitive):
    torch.manual_seed(0)
    module, x = primitive.make(8), torch.randn(2, 16, 8)
    torch.testing.assert_close(torch.compile(module)(x), module(x), rtol=1e-4, atol=1e-5)
