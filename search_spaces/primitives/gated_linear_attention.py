"""Gated linear attention (GLA) of tokens [B, N, C]: recurrent, parallel and chunked, all the same function.

S_t = diag(alpha_t) S_(t-1) + k_t^T v_t, o_t = q_t S_t, with gates alpha in (0, 1) from the input: causal by nature.
Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, ICML 2024, arXiv 2312.06635;
sizes and defaults of the authors' library (fla-org/flash-linear-attention).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.activations import check_channels
from search_spaces.primitives.attention import check_tokens, merge_heads, split_heads, wide
from search_spaces.primitives.primitive import Primitive


def gla_recurrent(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """One token after the other, O(N) time; q, k, log_gate [..., N, D], v [..., N, E] -> [..., N, E]."""
    state = q.new_zeros(*q.shape[:-2], q.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[-2]):
        state = log_gate[..., t, :, None].exp() * state + k[..., t, :, None] * v[..., t, None, :]
        outputs.append((q[..., t, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, -2)


def gla_scores(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """The sum over d of q_id k_jd exp(total_id - total_jd) for j <= i, else 0: [..., N, N].

    Differences of logarithms come first, so nothing overflows; `total` is the running sum of the log gates, and the
    relative error is about its size times the rounding unit.
    """
    count = q.shape[-2]
    later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
    decay = (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(later[..., None], float("-inf")).exp()
    return (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1)


def gla_parallel(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """All pairs of tokens at once: O(N^2) time and memory."""
    return gla_scores(q, k, log_gate.cumsum(-2)) @ v


def gla_chunked(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, chunk: int = 16) -> Tensor:
    """Pairs inside chunks, states between them: O(N chunk) time and memory."""
    length = q.shape[-2]
    q, k, v, gate = (F.pad(p, (0, 0, 0, -length % chunk)).unflatten(-2, (-1, chunk)) for p in (q, k, v, log_gate))
    total = gate.cumsum(-2)
    inside = gla_scores(q, k, total) @ v
    end = total[..., -1:, :]
    added = (k * (end - total).exp()).transpose(-1, -2) @ v  # what each chunk leaves to the next
    kept = end.exp().transpose(-1, -2)
    state, states = torch.zeros_like(added[..., 0, :, :]), []
    for c in range(added.shape[-3]):
        states.append(state)
        state = kept[..., c, :, :] * state + added[..., c, :, :]
    y = inside + (q * total.exp()) @ torch.stack(states, -3)
    return y.flatten(-3, -2)[..., :length, :]


FORMS = {"recurrent": gla_recurrent, "parallel": gla_parallel, "chunked": gla_chunked}


class GatedLinearAttention(nn.Module):
    """W_o (RMSNorm(o) silu(W_r x)) with o of the module's recurrence; causal.

    q, k have C / 2 channels and v has C, in `heads` heads (by default 4, or 1 where C / 2 is no multiple of 4), q is
    scaled by (C / 2 / heads)^(-1/2). Gates: alpha = sigmoid(x W_1 W_2 + b)^(1/16), W_1 of rank 16. RMSNorm over each
    head, eps 1e-5, weights [C / heads]. No biases but the gate's. form: `chunked` (default), `recurrent` or
    `parallel`, equal but for rounding. The recurrence is computed in float32 also under autocast.
    Errors: UserError for odd channels, heads that do not divide C / 2, or an unknown form.
    """

    def __init__(self, channels: int, *, heads: int | None = None, form: str = "chunked", rank: int = 16):
        super().__init__()
        if check_channels(channels) % 2:
            raise UserError(channels, "an even number of channels", str(channels + 1))
        keys = channels // 2
        heads = heads if heads is not None else (4 if keys % 4 == 0 else 1)
        if heads < 1 or keys % heads:
            raise UserError(heads, f"heads that divide the {keys} channels of the keys", "1")
        if form not in FORMS:
            raise UserError(form, f"one of {', '.join(FORMS)}", "chunked")
        self.heads, self.form = heads, form
        self.query = nn.Linear(channels, keys, bias=False)
        self.key = nn.Linear(channels, keys, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.gate = nn.Sequential(nn.Linear(channels, rank, bias=False), nn.Linear(rank, keys))
        self.output_gate = nn.Linear(channels, channels, bias=False)
        self.norm = nn.RMSNorm(channels // heads, eps=1e-5)
        self.project = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        gate = split_heads(self.gate(x), self.heads)
        with torch.autocast(x.device.type, enabled=False):
            log_gate = F.logsigmoid(wide(gate)) / 16
            y = FORMS[self.form](wide(q) * q.shape[-1] ** -0.5, wide(k), wide(v), log_gate)
            y = self.norm(y.to(self.norm.weight.dtype))
        return self.project(merge_heads(y).to(x.dtype) * F.silu(self.output_gate(x)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, form={self.form!r}"


def make_gla(channels: int, *, layout: str = "tokens", heads: int | None = None, form: str = "chunked") -> nn.Module:
    """`GatedLinearAttention`. Errors: UserError for another layout, and as there."""
    check_tokens(layout)
    return GatedLinearAttention(channels, heads=heads, form=form)


PRIMITIVES: tuple[Primitive, ...] = (
    Primitive(
        "gla",
        "mixing",
        "Wo (RMSNorm(o) silu(Wr x)), o_t = q_t S_t, S_t = diag(sigmoid(gate_t)^(1/16)) S_(t-1) + k_t^T v_t",
        "Yang et al., GLA, ICML 2024, arXiv 2312.06635; released code",
        make_gla,
        layouts=("tokens",),
        parameters="Wq, Wk [C/2, C], Wv, Wr, Wo [C, C]; gate [16, C], [C/2, 16] and bias [C/2]; RMSNorm [C/heads] 1",
    ),
)
