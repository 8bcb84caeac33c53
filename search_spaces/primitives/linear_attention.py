"""Attentions whose cost is linear in the number of tokens: SLA, norm-aware (NaLa), TransNormer's two; [B, N, C].

Sums over tokens are computed in float32 also under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.attention import check_tokens, head_count, merge_heads, split_heads, to_grid, wide
from search_spaces.primitives.primitive import Primitive


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (k^T v) for [..., N, D]: the sum of (q_i . k_j) v_j over all j, in O(N D^2)."""
    return q @ (k.transpose(-1, -2) @ v)


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """The sum of (q_i . k_j) v_j over j <= i, in O(N D (D + chunk)).

    Pairs inside a chunk are summed directly, earlier chunks through the running sum of their k^T v.
    """
    length = q.shape[-2]
    q, k, v = (F.pad(part, (0, 0, 0, -length % chunk)).unflatten(-2, (-1, chunk)) for part in (q, k, v))
    states = k.transpose(-1, -2) @ v  # [..., chunks, D, D]
    earlier = states.cumsum(-3) - states
    y = (q @ k.transpose(-1, -2)).tril() @ v + q @ earlier
    return y.flatten(-3, -2)[..., :length, :]


class SLA(nn.Module):
    """Simplified linear attention: relu(q) (relu(k)^T v) / (relu(q) . sum relu(k) + 1e-6), plus dwconv(v).

    The depthwise convolution (5 x 5, with bias) has one kernel per channel of a head, shared by the heads. tokens: N,
    for the authors' trained position code [1, N, C] (0) that is added to k; none by default. heads: one per 64
    channels. bias: of the q, k, v projections, on.
    Source: Guo et al., SLAB, 2024; released code (xinghaochen/SLAB), as in its DeiT.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int | None = None,
        kernel: int = 5,
        tokens: int | None = None,
        bias: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.heads, self.eps = head_count(channels, heads), eps
        size = channels // self.heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.local = nn.Conv2d(size, size, kernel, padding=kernel // 2, groups=size)
        self.project = nn.Linear(channels, channels)
        self.position = nn.Parameter(torch.zeros(1, tokens, channels)) if tokens is not None else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k = k if self.position is None else k + self.position
        q, k, v = split_heads(F.relu(q), self.heads), split_heads(F.relu(k), self.heads), split_heads(v, self.heads)
        with torch.autocast(x.device.type, enabled=False):
            q, k = wide(q), wide(k)
            sums = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True) + self.eps
            y = linear_attention(q, k, wide(v)) / sums
        local = self.local(to_grid(v).flatten(0, 1)).unflatten(0, (-1, self.heads))
        return self.project(merge_heads(y + local.flatten(3).transpose(-1, -2)).to(x.dtype))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, eps={self.eps}"


def grid_rotations(side: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [side^2, size]: the angles of a rotary position code of a square grid.

    The first half of a head turns with the row, the second with the column; pairs of channels share an angle, the
    frequencies are 10000^-t, t from 0 to 1 in size / 4 steps.
    """
    frequency = 10000.0 ** -torch.linspace(0, 1, size // 4, dtype=like.dtype, device=like.device)
    place = torch.arange(side, dtype=like.dtype, device=like.device)
    angle = (place[:, None] * frequency).repeat_interleave(2, -1)  # [side, size / 2]
    rows, columns = angle[:, None].expand(side, side, -1), angle[None].expand(side, side, -1)
    both = torch.cat([rows, columns], -1).flatten(0, 1)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of channels (0, 1), (2, 3), ... of x [..., N, D] by the angles of `grid_rotations`."""
    first, second = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-second, first], -1).flatten(-2) * sin


def norm_aware_features(q: Tensor, k: Tensor, power: float = 3.0) -> tuple[Tensor, Tensor]:
    """Features [..., N, 2 D] >= 0 of queries and keys, positive and negative parts side by side.

    q: (relu(+-q) / |q|)^p with p = power (1/2 + tanh |q|); k: relu(+-k^3).
    """
    norm = q.norm(dim=-1, keepdim=True)
    direction = q / norm.clamp_min(1e-12)  # q = 0 gives 0 instead of 0 / 0
    exponent = power * (0.5 + torch.tanh(norm))
    queries = torch.cat([F.relu(direction) ** exponent, F.relu(-direction) ** exponent], -1)
    return queries, torch.cat([F.relu(k**3), F.relu(-(k**3))], -1)


class NormAwareAttention(nn.Module):
    """Linear attention whose sharpness follows the norm of the query (NaLa).

    With the features a, b of `norm_aware_features` and R the rotary code of a grid: y_i = sum_j (R a_i . R b_j) v_j /
    (sum_j a_i . b_j + 1e-6 N); then W_o (LayerNorm(y + dwconv5(v)) silu(g)), g a fourth projection. heads: by default
    one per 64 channels; their size must be a multiple of 4 with `rotary`, which is on. Features in float32: k^3
    overflows it for |k| above 6e12.
    Source: Meng et al., NaLaFormer, 2025, arXiv 2506.21137; formulas of the released code (ZacharyMeng/NaLaFormer).
    The keys are cubed without their direction being split off, as there. q = 0, NaN there, attends to nothing here.
    """

    def __init__(self, channels: int, *, heads: int | None = None, rotary: bool = True, eps: float = 1e-6):
        super().__init__()
        self.heads, self.rotary, self.eps = head_count(channels, heads, 4 if rotary else 1), rotary, eps
        self.qkvg = nn.Linear(channels, 4 * channels)
        self.local = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.qkvg(x).chunk(4, -1)
        local = self.local(to_grid(v)).flatten(2).transpose(1, 2)
        tokens = x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = (split_heads(wide(part), self.heads) for part in (q, k, v))
            a, b = norm_aware_features(q, k)
            sums = (a * b.mean(-2, keepdim=True)).sum(-1, keepdim=True) + self.eps
            if self.rotary:
                cos, sin = grid_rotations(round(tokens**0.5), q.shape[-1], q)
                cos, sin = cos.repeat(1, 2), sin.repeat(1, 2)
                a, b = rotate(a, cos, sin), rotate(b, cos, sin)
            y = merge_heads(linear_attention(a, b / tokens, v) / sums)
        y = self.norm((y + local).to(x.dtype))
        return self.project(y * F.silu(gate))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, rotary={self.rotary}, eps={self.eps}"


class NormAttention(nn.Module):
    """TransNormer's linear attention: W_o RMSNorm(phi(Q) (phi(K)^T V)), phi = 1 + elu, no division by sums.

    The normalisation, over all channels, takes the place of the sums, whose gradients have no bound. heads: by default
    one per 64 channels. causal: token i sees tokens up to i, by chunks of 64. norm: weight [C] 1, eps 1e-6.
    Source: Qin et al., The Devil in Linear Transformer, EMNLP 2022, arXiv 2210.10340, variant T2; the
    width of the normalisation as in the first author's port (Doraemonzzz/transnormer-v2-pytorch).
    """

    def __init__(self, channels: int, *, heads: int | None = None, causal: bool = False, eps: float = 1e-6):
        super().__init__()
        self.heads, self.causal = head_count(channels, heads), causal
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm = nn.RMSNorm(channels, eps=eps)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = 1 + F.elu(wide(q)), 1 + F.elu(wide(k)), wide(v)
            y = causal_linear_attention(q, k, v) if self.causal else linear_attention(q, k, v)
            y = self.norm(merge_heads(y).to(self.norm.weight.dtype))
        return self.project(y.to(x.dtype))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"


class DiagAttention(nn.Module):
    """TransNormer's attention of its first layers: softmax attention inside blocks of `block` tokens, O(N block C).

    The last block is shorter where N is no multiple. block: 64. heads, causal: as of SoftmaxAttention.
    Source: Qin et al., EMNLP 2022, arXiv 2210.10340, variant T2.
    """

    def __init__(self, channels: int, *, heads: int | None = None, block: int = 64, causal: bool = False):
        super().__init__()
        if block < 1:
            raise UserError(block, "a block of at least one token", "64")
        self.heads, self.block, self.causal = head_count(channels, heads), block, causal
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        whole = x.shape[1] - x.shape[1] % self.block
        parts = []
        if whole:
            blocks = [part[:, :, :whole].unflatten(2, (-1, self.block)) for part in (q, k, v)]
            y = F.scaled_dot_product_attention(blocks[0], blocks[1], blocks[2], is_causal=self.causal)
            parts.append(y.flatten(2, 3))
        if whole < x.shape[1]:
            q, k, v = (part[:, :, whole:] for part in (q, k, v))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal))
        return self.project(merge_heads(torch.cat(parts, 2)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, block={self.block}, causal={self.causal}"


def make_sla(channels: int, *, layout: str = "tokens", heads: int | None = None) -> nn.Module:
    """`SLA`. Errors: UserError for another layout or heads that do not divide the channels."""
    check_tokens(layout)
    return SLA(channels, heads=heads)


def make_norm_aware(
    channels: int, *, layout: str = "tokens", heads: int | None = None, rotary: bool | None = None
) -> nn.Module:
    """`NormAwareAttention`; rotary by default where the heads' size is a multiple of 4. Errors: as for `make_sla`."""
    check_tokens(layout)
    count = head_count(channels, heads)
    rotary = channels % (4 * count) == 0 if rotary is None else rotary
    return NormAwareAttention(channels, heads=count, rotary=rotary)


def make_norm_attention(
    channels: int, *, layout: str = "tokens", heads: int | None = None, causal: bool = False
) -> nn.Module:
    """`NormAttention`. Errors: as for `make_sla`."""
    check_tokens(layout)
    return NormAttention(channels, heads=heads, causal=causal)


def make_diag_attention(
    channels: int, *, layout: str = "tokens", heads: int | None = None, block: int = 64, causal: bool = False
) -> nn.Module:
    """`DiagAttention`. Errors: as for `make_sla`, and for a block without tokens."""
    check_tokens(layout)
    return DiagAttention(channels, heads=heads, block=block, causal=causal)


_FOUR = "Wq, Wk, Wv, Wo [C, C] and biases [C]"
_TRANSNORMER = "Qin et al., The Devil in Linear Transformer, EMNLP 2022, arXiv 2210.10340, "

PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "sla",
        "mixing",
        "Wo (relu(Q) (relu(K)^T V) / (relu(Q) . sum relu(K) + 1e-6) + dwconv5(V))",
        "Guo et al., SLAB, 2024; released code (xinghaochen/SLAB)",
        make_sla,
        layouts=("tokens",),
        parameters=_FOUR + "; dwconv [d, 1, 5, 5] and bias [d]",
        needs=("square-grid",),
    ),
    Primitive(
        "nalaformer",
        "mixing",
        "Wo (LN(a (b^T V) / a.sum b + dwconv5(V)) silu(g)), a = (relu(+-q) / |q|)^(3 (1/2 + tanh|q|)), b = relu(+-k^3)",
        "Meng et al., NaLaFormer, 2025, arXiv 2506.21137; released code",
        make_norm_aware,
        layouts=("tokens",),
        parameters=_FOUR + "; Wg [C, C] and bias; LayerNorm [C]; dwconv [C, 1, 5, 5] and bias [C]",
        needs=("square-grid",),
    ),
    Primitive(
        "transnormer-norm",
        "mixing",
        "Wo RMSNorm(phi(Q) (phi(K)^T V)), phi(x) = 1 + elu(x)",
        _TRANSNORMER + "variant T2; width of the norm from the first author's port",
        make_norm_attention,
        layouts=("tokens",),
        parameters=_FOUR + "; RMSNorm [C] 1",
    ),
    Primitive(
        "transnormer-diag",
        "mixing",
        "Wo softmax(Q K^T / sqrt(d)) V inside blocks of 64 tokens",
        _TRANSNORMER + "variant T2",
        make_diag_attention,
        layouts=("tokens",),
        parameters=_FOUR,
    ),
)
