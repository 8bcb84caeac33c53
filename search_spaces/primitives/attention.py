"""Softmax attention and SOFT, the softmax-free attention of a Gaussian kernel; tokens [B, N, C]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.activations import check_channels
from search_spaces.primitives.primitive import Primitive


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, N, D] -> [B, N, heads * D]."""
    return x.transpose(1, 2).flatten(2)


def wide(x: Tensor) -> Tensor:
    """Half precision as float32: long sums over tokens need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def head_count(channels: int, heads: int | None, multiple_of: int = 1) -> int:
    """`heads`, by default one per 64 channels where that fits, else 1.

    Errors: UserError unless heads divide the channels into parts that are multiples of `multiple_of`.
    """
    check_channels(channels)
    if heads is None:
        heads = channels // 64 if channels % 64 == 0 else 1
    if heads < 1 or channels % (heads * multiple_of):
        fits = [h for h in range(1, max(heads, 1) + 1) if channels % (h * multiple_of) == 0]
        parts = "equal parts" if multiple_of == 1 else f"equal parts, multiples of {multiple_of},"
        raise UserError(heads, f"heads that make {parts} of {channels} channels", str(max(fits)) if fits else None)
    return heads


def check_tokens(layout: str) -> None:
    """UserError unless the layout is `tokens`."""
    if layout != "tokens":
        raise UserError(layout, "the layout of an attention", "tokens")


def to_grid(x: Tensor) -> Tensor:
    """Tokens [..., N, D] of a square image as [..., D, side, side]."""
    side = round(x.shape[-2] ** 0.5)
    return x.transpose(-1, -2).unflatten(-1, (side, side))


class SoftmaxAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V for each head, then a linear layer; the usual attention, O(N^2 C).

    heads: by default one per 64 channels. causal: token i sees tokens up to i. bias: of the projections, on.
    Source: Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762, section 3.2.
    """

    def __init__(self, channels: int, *, heads: int | None = None, causal: bool = False, bias: bool = True):
        super().__init__()
        self.heads, self.causal = head_count(channels, heads), causal
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.project = nn.Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.project(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"


def gaussian_scores(q: Tensor, k: Tensor) -> Tensor:
    """exp(-|q_i - k_j|^2 / 2) for q [..., N, D] and k [..., M, D]: [..., N, M]."""
    squares = q.square().sum(-1, keepdim=True) + k.square().sum(-1).unsqueeze(-2)
    return torch.exp(-0.5 * (squares - 2 * q @ k.transpose(-1, -2)).clamp_min(0))


def newton_inverse(matrix: Tensor, iterations: int = 20, ridge: float = 0.01) -> Tensor:
    """An approximation of (A + ridge I)^-1 for symmetric A >= 0 with entries >= 0, [..., M, M].

    V <- 2 V - V P V from V = alpha P, P = A + ridge I, alpha = 1.8 / (largest row sum of A)^2. The error of the
    eigenvalue p of P is (1 - alpha p^2)^(2^iterations): small eigenvalues of large matrices are damped, not inverted.
    Source: as SOFT; ridge, alpha and 20 iterations as in the released code, whose backward pass
    takes the exact inverse's derivative, where this one differentiates the iterations.
    """
    alpha = 1.8 / matrix.sum(-1).amax(-1)[..., None, None].square()
    p = matrix + ridge * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    v = alpha * p
    for _ in range(iterations):
        v = 2 * v - v @ p @ v
    return v


class SOFT(nn.Module):
    """Softmax-free attention: a Gaussian kernel of tokens, through landmarks (Nystroem), without normalisation.

    Per head with q = k = W_q x / d^(1/4): landmarks l = gelu(LayerNorm(conv(q))), a convolution of kernel and stride
    `ratio` over the square grid of tokens, shared by the heads; E_ij = exp(-|q_i - l_j|^2 / 2), A_ij likewise of l_i
    and l_j; output W_o (E A^-1 E^T v + dwconv(v)), the inverse by `newton_inverse` and the depthwise convolution with
    one 3 x 3 kernel per head. With M = N / ratio^2 landmarks the cost is O(N M C + M^3): linear in N when the ratio
    grows with the side, as in the paper's stages (49 landmarks in all).

    heads: by default one per 64 channels. ratio: 2; the grid's side should be a multiple. conv: odd side of the
    depthwise kernel, 3; 0 leaves it out. Kernel and inverse are computed in float32.
    Source: Lu et al., SOFT: Softmax-free Transformer with Linear Complexity, NeurIPS 2021; released code.
    """

    def __init__(self, channels: int, *, heads: int | None = None, ratio: int = 2, conv: int = 3, iterations: int = 20):
        super().__init__()
        self.heads = head_count(channels, heads)
        self.iterations = iterations
        size = channels // self.heads
        self.query = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.landmarks = nn.Conv2d(size, size, ratio, ratio, bias=False)
        self.norm = nn.LayerNorm(size)
        self.local = None
        if conv:
            self.local = nn.Conv2d(self.heads, self.heads, conv, padding=conv // 2, groups=self.heads, bias=False)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, v = split_heads(self.query(x), self.heads), split_heads(self.value(x), self.heads)
        q = q * q.shape[-1] ** -0.25
        summary = self.landmarks(to_grid(q).flatten(0, 1)).flatten(2).transpose(1, 2)
        summary = F.gelu(self.norm(summary)).unflatten(0, (-1, self.heads))
        with torch.autocast(x.device.type, enabled=False):
            summary, values = wide(summary), wide(v)
            tokens = gaussian_scores(wide(q), summary)
            inverse = newton_inverse(gaussian_scores(summary, summary), self.iterations)
            y = (tokens @ inverse) @ (tokens.transpose(-1, -2) @ values)
        if self.local is not None:
            grid = to_grid(v).transpose(1, 2)  # the channels of a head are convolved alike
            grid = self.local(grid.flatten(0, 1)).unflatten(0, grid.shape[:2])
            y = y + grid.transpose(1, 2).flatten(3).transpose(-1, -2)
        return self.project(merge_heads(y).to(x.dtype))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, iterations={self.iterations}"


def make_softmax_attention(
    channels: int, *, layout: str = "tokens", heads: int | None = None, causal: bool = False
) -> nn.Module:
    """`SoftmaxAttention`. Errors: UserError for another layout or heads that do not divide the channels."""
    check_tokens(layout)
    return SoftmaxAttention(channels, heads=heads, causal=causal)


def make_soft(channels: int, *, layout: str = "tokens", heads: int | None = None, ratio: int = 2) -> nn.Module:
    """`SOFT`. Errors: UserError for another layout, heads that do not divide the channels, a ratio below 1."""
    check_tokens(layout)
    if ratio < 1:
        raise UserError(ratio, "a positive ratio", "1")
    return SOFT(channels, heads=heads, ratio=ratio)


_LINEAR = "Wq, Wk, Wv, Wo [C, C] and biases [C]"

PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "softmax-attention",
        "mixing",
        "Wo softmax(Q K^T / sqrt(d)) V",
        "Vaswani et al., 2017, arXiv 1706.03762, section 3.2",
        make_softmax_attention,
        layouts=("tokens",),
        parameters=_LINEAR,
    ),
    Primitive(
        "soft",
        "mixing",
        "Wo (E A^-1 E^T V + dwconv3(V)), E = exp(-|q - l|^2 / 2), A = exp(-|l - l'|^2 / 2), l landmarks of q = k",
        "Lu et al., SOFT, NeurIPS 2021; released code",
        make_soft,
        layouts=("tokens",),
        parameters="Wq, Wv, Wo [C, C] and biases [C]; landmarks [d, d, 2, 2]; LayerNorm [d]; dwconv [heads, 1, 3, 3]",
        needs=("square-grid",),
    ),
)
