"""Unusual models and batches: each has a defined answer, a value, a reason or a UserError that names the value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zero_cost import UserError, score


def images(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


# Of transformers, recurrent networks and implicit ones: a reason everywhere else.
OF_OTHER_MODELS = {
    *("dss", "synaptic-diversity", "synaptic-saliency", "head-importance", "attention-confidence"),
    *("softmax-confidence", "w-pca", "activation-distance", "hidden-covariance", "hidden-covariance-last"),
    *("hidden-saliency", "recurrent-saliency", "spectrum"),
}


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, padding=1),
        *middle,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    ]
    return nn.Sequential(*layers)


class Returns(nn.Module):
    """A network whose output is dressed up by `dress`."""

    def __init__(self, dress):
        super().__init__()
        self.network, self.dress = network(), dress

    def forward(self, x):
        return self.dress(self.network(x))


class HasLogits:
    def __init__(self, logits):
        self.logits = logits


def test_without_batch_norm_every_proxy_works():
    found = score(network(), [images(), images()[::1]], stages=["0", "1"])
    assert set(found.reasons) == {"reg-swap"} | OF_OTHER_MODELS


@pytest.mark.parametrize(
    "dress",
    [
        lambda y: (y, torch.zeros(3)),
        lambda y: [None, y],
        lambda y: {"features": y * 2, "logits": y},
        lambda y: {"first": y, "second": y * 2},
        HasLogits,
    ],
    ids=["tuple", "list", "logits", "mapping", "attribute"],
)
def test_several_outputs_have_one_that_counts(dress):
    data = images()
    expected, found = score(network(), data), score(Returns(dress), data)
    for name in ("grad-norm", "synflow", "jacov", "nwot", "gradsign", "ntk-trace", "zen"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), (name, found.reasons.get(name))


def test_the_caller_may_say_which_output_counts():
    found = score(Returns(lambda y: (y * 2, y)), images(), "grad-norm", output=lambda pair: pair[1])
    assert found["grad-norm"] == pytest.approx(score(network(), images(), "grad-norm")["grad-norm"], rel=1e-6)


def test_an_output_without_a_tensor_is_a_reason():
    found = score(Returns(lambda y: "text"), images(), ["params", "grad-norm"])
    assert found["params"] == sum(p.numel() for p in network().parameters())
    assert "str" in found.reasons["grad-norm"]


class Language(nn.Module):
    """Tokens [B, T] -> logits [B, T, vocabulary]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.head = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 20)

    def forward(self, tokens):
        return self.head(self.hidden(self.embedding(tokens)).relu())


def test_integer_inputs():
    tokens = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
    model, labels = Language(), tokens.roll(-1, 1)
    found = score(model, (tokens, labels))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    grads = torch.autograd.grad(loss, [model.hidden.weight, model.head.weight])
    assert found["grad-norm"] == pytest.approx(float(sum(g.norm() for g in grads)), rel=1e-6)
    for name in ("jacov", "nwot", "synflow", "gradsign", "ntk-trace", "params", "macs", "grasp", "fisher"):
        assert math.isfinite(found[name]), found.reasons[name]
    assert "integer" in found.reasons["zen"]
    # by sample: what jacov sees are gradients at the embeddings
    embedded = model.embedding(tokens).detach().requires_grad_()
    rows = torch.autograd.grad(model.head(model.hidden(embedded).relu()).sum(), embedded)[0].flatten(1)
    values = torch.linalg.eigvalsh(torch.corrcoef(rows.double())).clamp(min=0) + 1e-5
    assert found["jacov"] == pytest.approx(float(-(values.log() + 1 / values).sum()), rel=1e-6)


def test_pixels_as_labels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    labels = torch.randint(5, (4, 8, 8))
    assert math.isfinite(score(model, (torch.randn(4, 3, 8, 8), labels), "snip")["snip"])


def test_a_loss_of_ones_own():
    inputs, _ = images()
    targets = torch.randn(8, 10)
    model = network()
    found = score(model, (inputs, targets), "grad-norm", loss=nn.functional.mse_loss)
    weights = [model[0].weight, model[-1].weight]
    grads = torch.autograd.grad(nn.functional.mse_loss(model(inputs), targets), weights)
    assert found["grad-norm"] == pytest.approx(float(sum(g.norm() for g in grads)), rel=1e-6)


def test_a_batch_of_one():
    found = score(network(nn.BatchNorm2d(6)), images(1))
    assert math.isfinite(found["grad-norm"])
    for name in ("nwot", "jacov", "epe-nas", "linear-regions", "ntk-condition"):
        assert found.reasons[name] == "needs at least 2 samples, got 1"
    flat = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 10))
    found = score(flat, (torch.randn(1, 4), torch.tensor([1])), ["grad-norm", "params", "synflow"])
    assert "more than 1 value per channel" in found.reasons["grad-norm"]
    assert set(found.reasons) == {"grad-norm"}


@pytest.mark.parametrize("label", [10, -1])
def test_labels_out_of_range(label):
    inputs, labels = images()
    labels[3] = label
    with pytest.raises(UserError, match=rf"{label}: expected labels from 0 to 9"):
        score(network(), (inputs, labels))


def test_ignored_labels_are_allowed():
    inputs, labels = images()
    labels[3] = -100
    assert math.isfinite(score(network(), (inputs, labels), "grad-norm")["grad-norm"])


def test_a_model_that_returns_nan():
    found = score(Returns(lambda y: y * float("nan")), [images(), images()])
    assert math.isfinite(found["params"])
    for name in ("grad-norm", "snip", "jacov", "synflow", "ntk-condition", "zico", "grasp", "fisher", "epe-nas"):
        assert math.isnan(found[name]), name
        assert found.reasons[name], name


def test_out_of_memory_is_a_reason_that_says_what_to_do():
    class Hungry(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 10)

        def forward(self, x):
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return self.layer(x)

    found = score(Hungry(), (torch.randn(8, 4), torch.arange(8)), ["grad-norm", "params", "synflow"])
    assert "out of memory with 8 samples" in found.reasons["grad-norm"]
    assert "smaller batch" in found.reasons["grad-norm"]
    assert set(found.reasons) == {"grad-norm"}


def test_an_output_that_does_not_depend_on_the_input():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.answer = nn.Linear(4, 10), nn.Parameter(torch.zeros(10))

        def forward(self, x):
            self.layer(x)
            return self.answer.expand(len(x), -1)

    found = score(
        Constant(), (torch.randn(8, 4), torch.arange(8)), ["jacov", "grad-norm", "macs", "live-macs", "paths"]
    )
    assert (found["macs"], found["live-macs"], found["grad-norm"]) == (40, 0, 0)
    assert {name: reason for name, reason in found.reasons.items() if "does not depend on the input" in reason} == dict(
        found.reasons
    )
    assert set(found.reasons) == {"jacov", "paths"}


def test_a_model_without_weights():
    found = score(nn.Flatten(), (torch.randn(4, 10), torch.arange(4)))
    assert found["params"] == 0
    assert {"grad-norm", "l2-norm", "snip", "synflow", "gradsign", "ntk-trace"} <= set(found.reasons)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(0, 3, 8, 8), "at least one sample"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(3).long()), "as many labels"),
        ([], "at least one batch"),
        (3, "expected inputs"),
        ([("text", None)], "a batch of tensors"),
    ],
)
def test_what_is_no_batch_is_named(batch, message):
    with pytest.raises(UserError, match=message):
        score(network(), batch)


def test_an_unknown_proxy_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'synflow'"):
        score(network(), images(), ["sinflow"])
    assert "grad-norm" in score(network(), images(), "grad_norm")


def test_frozen_models_score_like_others():
    expected = score(network(), images(), ["grad-norm", "grasp"])
    assert dict(score(network().requires_grad_(False), images(), ["grad-norm", "grasp"])) == dict(expected)


def test_inside_no_grad_the_scores_are_the_same():
    expected = score(network(), [images(), images()], stages=["0"])
    with torch.no_grad():
        found = score(network(), [images(), images()], stages=["0"])
    assert dict(found) == pytest.approx(dict(expected), nan_ok=True)


class Reader(nn.Module):
    """Tokens -> logits [B, 10], through attention, a feed-forward pair and an LSTM, with dropout everywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True, dropout=0.3)
        self.head = nn.Linear(6, 10)

    def forward(self, tokens):
        return self.head(self.lstm(self.block(self.embedding(tokens)))[0][:, -1])


def sentences(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(20, (count, 6), generator=generator), torch.randint(10, (count,), generator=generator)


OF_SEQUENCES = OF_OTHER_MODELS - {"spectrum"} | {"jacobian-cosine"}


def test_language_models_have_the_scores_of_their_layers():
    model = Reader()
    found = score(model, sentences(), OF_SEQUENCES)
    assert not found.reasons
    assert dict(score(model, sentences(), OF_SEQUENCES)) == dict(found)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    assert all(p.grad is None for p in model.parameters())
    for name in OF_SEQUENCES:
        assert score(model, sentences(), name)[name] == pytest.approx(found[name], rel=1e-5), name


def test_a_batch_of_one_sentence():
    found = score(Reader(), sentences(1), OF_SEQUENCES)
    assert set(found.reasons) == {"activation-distance", "jacobian-cosine"}


class Broken(Reader):
    def __init__(self, where: str):
        super().__init__()
        self.where = where

    def forward(self, tokens):
        x = self.block(self.embedding(tokens))
        if self.where == "raises":
            raise RuntimeError("broken on purpose")
        return (
            self.head(self.lstm(x * float("nan"))[0][:, -1])
            if self.where == "inside"
            else super().forward(tokens) * float("nan")
        )


@pytest.mark.parametrize("where", ["inside", "outside", "raises"])
def test_sequence_models_that_return_nan_or_raise_have_reasons(where):
    model = Broken(where)
    found = score(model, sentences(), OF_SEQUENCES)
    for name in OF_SEQUENCES:
        assert math.isnan(found[name]) == bool(found.reasons.get(name)), name
    bad = {"dss", "synaptic-diversity", "synaptic-saliency", "recurrent-saliency", "hidden-saliency", "jacobian-cosine"}
    assert bad <= set(found.reasons)
    if where != "outside":
        assert "hidden-covariance" in found.reasons
    assert ("attention-confidence" in found.reasons) == (where == "raises")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.lstm.training
    assert model.lstm.dropout == 0.3
