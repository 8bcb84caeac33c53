"""Proxies of transformers against hooks, deep copies and numpy; which layers are recognised; and who has no value."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.layers.anchors import anchor
from search_spaces.primitives.attention import SoftmaxAttention
from zero_cost import PROXIES, score
from zero_cost.layers import transformer_layers

NAMES = (
    "dss", "synaptic-diversity", "synaptic-saliency", "head-importance", "attention-confidence", "softmax-confidence",
    "w-pca", "activation-distance",
)  # fmt: skip


def vision() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = anchor("vit", lambda channels: nn.LayerNorm(channels), width=4).double()
    return model, torch.randn(6, 3, 16, 16).double()


class Language(nn.Module):
    """Tokens [B, T] -> logits [B, T, 20]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 24, dropout=0.2, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 20)
        with torch.no_grad():  # or the two copies are one
            for parameter in self.parameters():
                parameter.normal_(0, 0.4)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)))


def language() -> tuple[nn.Module, torch.Tensor]:
    return Language().double(), torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(0))


def without_dropout(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def of_attention(name: str) -> bool:
    return any(word in name for word in ("qkv", "project", "self_attn"))


def nuclear(matrix: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.detach()).sum())


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.dim() >= 2 and "embedding" not in n}


@pytest.mark.parametrize("make", [vision, language])
def test_gradient_scores_equal_a_backward_pass_of_their_own(make):
    model, inputs = make()
    found = score(model, inputs, ["synaptic-diversity", "synaptic-saliency", "head-importance"])
    model = without_dropout(model)
    model(inputs).sum().backward()
    weights = matrices(model)
    attention = {n: p for n, p in weights.items() if of_attention(n)}
    widening = {n: p for n, p in weights.items() if any(w in n for w in ("expand", "reduce", "linear1", "linear2"))}
    assert len(attention) == len(widening) == 4
    expected = {
        "synaptic-diversity": sum(nuclear(p) * nuclear(p.grad) for p in attention.values()),
        "synaptic-saliency": sum(float((p * p.grad).abs().sum()) for p in widening.values()),
        "head-importance": sum(float((p * p.grad).abs().sum()) for p in attention.values()),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), found.reasons.get(name)


@pytest.mark.parametrize("make", [vision, language])
def test_dss_equals_a_copy_with_absolute_parameters(make):
    model, inputs = make()
    found = score(model, inputs, "dss")
    model = without_dropout(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    model(torch.ones_like(inputs[:1])).sum().backward()
    expected = sum(
        nuclear(p) * nuclear(p.grad) if of_attention(name) else float((p * p.grad).abs().sum())
        for name, p in matrices(model).items()
    )
    assert found["dss"] == pytest.approx(expected, rel=1e-6), found.reasons


def test_confidences_of_the_vision_transformer_by_hooks():
    model, inputs = vision()
    found = score(model, inputs, ["attention-confidence", "softmax-confidence", "w-pca"])
    head = softmax = components = 0.0
    outputs: dict[str, torch.Tensor] = {}
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, out, name=name: outputs.__setitem__(name, out.detach()))
    copied(inputs)
    for block in range(2):
        parts = outputs[f"blocks.{block}.attention.qkv"].chunk(3, -1)
        head += sum(float(part.max(1).values.mean()) for part in parts)
        q, k = (part.unflatten(-1, (copied.blocks[block].attention.heads, -1)).transpose(1, 2) for part in parts[:2])
        probabilities = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5, -1)
        softmax += float(probabilities.max(-1).values.mean())
        hidden = outputs[f"blocks.{block}.expand"].flatten(0, 1).numpy()
        shares = np.linalg.svd(hidden - hidden.mean(0), compute_uv=False) ** 2
        components += next(k for k in range(1, 99) if shares[:k].sum() > 0.99 * shares.sum())
    assert found["attention-confidence"] == pytest.approx(head, rel=1e-9)
    assert found["softmax-confidence"] == pytest.approx(softmax, rel=1e-9)
    assert found["w-pca"] == sum(p.numel() for p in model.parameters()) * components


def test_confidences_of_multi_head_attention_equal_torchs_own_weights():
    model, inputs = language()
    found = score(model, inputs, ["attention-confidence", "softmax-confidence"])
    model = without_dropout(model)
    head = softmax = 0.0
    x = model.embedding(inputs)
    for layer in model.encoder.layers:
        own = layer.self_attn
        probabilities = own(x, x, x, need_weights=True, average_attn_weights=False)[1]
        softmax += float(probabilities.max(-1).values.mean())
        for matrix, bias in zip(own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3), strict=True):
            head += float((x @ matrix.T + bias).max(1).values.mean())
        x = layer(x)
    assert found["attention-confidence"] == pytest.approx(head, rel=1e-9)
    assert found["softmax-confidence"] == pytest.approx(softmax, rel=1e-9)


def test_activation_distance_counts_signs_of_every_activation():
    model, inputs = language()
    found = score(model, inputs, "activation-distance")
    model = without_dropout(model)
    seen = []
    for layer in model.encoder.layers:
        layer.linear1.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    model(inputs)
    codes = (torch.cat([x.flatten(1) for x in seen], 1) > 0).double()
    kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
    assert found["activation-distance"] == pytest.approx(float(torch.logdet(kernel)), rel=1e-9)


class Named(nn.Module):
    """The same attention under another library's names."""

    def __init__(self, names: tuple[str, ...], output: str, stacked: nn.Parameter, last: nn.Parameter):
        super().__init__()
        self.names, self.output = names, output
        for name, matrix in zip(names, stacked.chunk(len(names)), strict=True):
            setattr(self, name, nn.Linear(8, len(matrix), bias=False))
            getattr(self, name).weight = nn.Parameter(matrix.detach().clone())
        setattr(self, output, nn.Linear(8, 8, bias=False))
        getattr(self, output).weight = nn.Parameter(last.detach().clone())

    def forward(self, x):
        q, k, v = torch.cat([getattr(self, name)(x) for name in self.names], -1).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
        x = (torch.softmax(q @ k.transpose(2, 3) / 2, dim=-1) @ v).transpose(1, 2).flatten(2)
        return getattr(self, self.output)(x)


LIBRARIES = [
    (("q", "k", "v"), "out"),
    (("query", "key", "value"), "dense"),
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("to_qkv",), "to_out"),
    (("Wqkv",), "out_proj"),
    (("query_key_value",), "dense"),
    (("c_attn",), "c_proj"),
]


@pytest.mark.parametrize(("names", "output"), LIBRARIES)
def test_attention_is_recognised_whatever_its_projections_are_called(names, output):
    torch.manual_seed(0)
    built_in = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)

    class BuiltIn(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = built_in

        def forward(self, x):
            return self.attention(x, x, x)[0]

    own = Named(names, output, built_in.in_proj_weight, built_in.out_proj.weight)
    x = torch.randn(4, 5, 8)
    chosen = ["attention-confidence", "softmax-confidence", "head-importance"]
    expected, found = score(BuiltIn(), x, chosen), score(own, x, chosen)
    assert not expected.reasons
    assert dict(found) == pytest.approx(dict(expected), rel=1e-5), found.reasons


def test_fused_attention_has_the_probabilities_of_its_definition():
    torch.manual_seed(0)
    model, x = SoftmaxAttention(16, heads=2, causal=True), torch.randn(3, 6, 16)
    q, k, _ = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in model.qkv(x).chunk(3, -1))
    scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    expected = float(scores.softmax(-1).max(-1).values.mean())
    assert score(model, x, "softmax-confidence")["softmax-confidence"] == pytest.approx(expected, rel=1e-6)


def test_a_classifiers_softmax_is_no_attention():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = SoftmaxAttention(16, heads=2), nn.Linear(16, 5)

        def forward(self, x):
            return F.softmax(self.head(self.attention(x)), dim=-1)

    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(3, 6, 16)
    alone = score(model.attention, x, "softmax-confidence")["softmax-confidence"]
    assert score(model, x, "softmax-confidence")["softmax-confidence"] == pytest.approx(alone)


def test_feed_forward_pairs():
    class Block(nn.Module):
        """All in one module, with a pair as wide as its input, which only its place tells from the projections."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    layers = transformer_layers(Block())
    assert layers.feed_forward == (("fc1.weight", "fc2.weight"),)
    assert layers.weights == {"q.weight", "k.weight", "v.weight", "o.weight"}
    perceptron = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    assert transformer_layers(perceptron).feed_forward == ()  # no attention, no transformer


def test_without_attention_there_is_a_reason_and_no_cost():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    found = score(model, torch.randn(4, 3, 8, 8), NAMES)
    assert set(found.reasons) == set(NAMES)
    assert all("attention" in reason for reason in found.reasons.values())
    assert "sequences" not in found.seconds
    only = score(SoftmaxAttention(16, heads=2), torch.randn(4, 6, 16), ["w-pca", "synaptic-saliency"])
    assert set(only.reasons.values()) == {"the model has no feed-forward pairs of linear layers"}


def test_needs_are_stated():
    assert {name for name in NAMES if PROXIES[name].backward} == {
        "dss", "synaptic-diversity", "synaptic-saliency", "head-importance",
    }  # fmt: skip
    assert not any(PROXIES[name].labels for name in NAMES)
