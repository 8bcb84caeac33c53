"""Which layers of a model attend and which are feed-forward: read off the modules, whatever library wrote them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

# How many matrices a projection of this name holds; a fused one is read in equal parts.
PARTS = {
    **dict.fromkeys(("q", "k", "v", "query", "key", "value", "queries", "keys", "values", "qs", "ks", "vs"), 1),
    **dict.fromkeys(("qk", "kv", "keyvalue"), 2),
    **dict.fromkeys(("qkv", "querykeyvalue", "attn"), 3),
}
_WORDS_OF_NO_MEANING = frozenset(
    ("proj", "projection", "linear", "lin", "layer", "dense", "fc", "c", "w", "to", "in", "x")
)


@dataclass(frozen=True)
class TransformerLayers:
    """modules: names of the attention layers. projections: {weight of a projection to queries, keys or values: how
    many of them it holds}. weights: all matrices of attention layers. feed_forward: (first, second) weight of each
    pair d -> h -> d."""

    modules: tuple[str, ...]
    projections: dict[str, int]
    weights: frozenset[str]
    feed_forward: tuple[tuple[str, str], ...]


def transformer_layers(model: nn.Module) -> TransformerLayers:
    """An attention layer is an nn.MultiheadAttention, or a module with linear children named like queries (`q`,
    `query`, `q_proj`, `to_qkv`, `c_attn`); every linear layer inside it is its own, but for pairs that widen.

    A feed-forward pair are two linear layers, one after the other in the order of definition, of which the second
    undoes the change of width of the first.
    """
    modules: list[str] = []
    projections: dict[str, int] = {}
    inside: dict[str, nn.Linear] = {}
    built_in: list[str] = []
    for prefix, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            modules.append(prefix)
            names = [f"{prefix}." * bool(prefix) + name for name, p in module.named_parameters() if p.dim() == 2]
            built_in += [name for name in names if "bias_" not in name]
            continue
        linear = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        parts = {name: PARTS[_plain(name)] for name in linear if _plain(name) in PARTS}
        if any(_plain(name)[0] in "qa" for name in parts):  # queries, or all three at once
            modules.append(prefix)
            start = f"{prefix}." * bool(prefix)
            projections |= {f"{start}{name}.weight": count for name, count in parts.items()}
            inside |= {start + name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    others = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and f"{name}.weight" not in {*projections, *built_in}
    ]
    feed_forward, k = [], 0
    while k + 1 < len(others):
        (name, first), (following, second) = others[k : k + 2]
        same = (first.in_features, first.out_features) == (second.out_features, second.in_features)
        if same and (name not in inside or first.out_features > first.in_features):
            feed_forward.append((f"{name}.weight", f"{following}.weight"))
            k += 1
        k += 1
    paired = {name for pair in feed_forward for name in pair}
    weights = {*built_in, *(f"{name}.weight" for name in inside if f"{name}.weight" not in paired)}
    return TransformerLayers(
        tuple(modules), projections, frozenset(weights), tuple(feed_forward) if modules else ()
    )  # fmt: skip


def _plain(name: str) -> str:
    """`to_qkv`, `qkvProj` and `Wqkv` -> `qkv`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")
    plain = "".join(word for word in words if word not in _WORDS_OF_NO_MEANING)
    return plain[1:] if plain[:1] == "w" and plain[1:] in PARTS else plain or "-"
