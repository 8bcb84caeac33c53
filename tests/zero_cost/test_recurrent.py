"""Proxies of recurrent networks against cells run by hand, retained gradients and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from zero_cost import score
from zero_cost.passes.recurrent import unrolled

NAMES = ("hidden-covariance", "hidden-covariance-last", "hidden-saliency", "recurrent-saliency")


def reference_covariance(states: list[torch.Tensor]) -> float:
    """Units x (samples and steps), as in the released code; states [B, H]."""
    stacked = torch.stack([h.detach() for h in states], 2).transpose(0, 1).flatten(1)
    values = np.maximum(np.linalg.eigvalsh(np.corrcoef(stacked.numpy())), 0) + 1e-5
    return float(-np.sum(np.log(values) + 1 / values))


def tokens() -> torch.Tensor:
    return torch.randint(12, (5, 7), generator=torch.Generator().manual_seed(0))


class Stacked(nn.Module):
    """Two layers of LSTM cells, by nn.LSTM or by hand."""

    def __init__(self, by_hand: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.lstm = nn.Embedding(12, 6), nn.LSTM(6, 4, 2, batch_first=True, dropout=0.5)
        self.head, self.by_hand = nn.Linear(4, 12), by_hand
        self.states: list[list[torch.Tensor]] = [[], []]

    def forward(self, x):
        x = self.embedding(x)
        if not self.by_hand:
            return self.head(self.lstm(x)[0])
        outputs = list(x.unbind(1))
        for layer in range(2):
            h = c = x.new_zeros(len(x), 4)
            weights = [getattr(self.lstm, f"{kind}_l{layer}") for kind in ("weight_ih", "weight_hh")]
            bias = getattr(self.lstm, f"bias_ih_l{layer}") + getattr(self.lstm, f"bias_hh_l{layer}")
            for t, inside in enumerate(outputs):
                i, f, g, o = (inside @ weights[0].T + h @ weights[1].T + bias).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                h.retain_grad()
                self.states[layer].append(h)
                outputs[t] = h
        return self.head(torch.stack(outputs, 1))


def test_an_lstm_of_two_layers_by_hand():
    found = score(Stacked().double(), tokens(), NAMES)
    model = Stacked(by_hand=True).double()
    outputs = model(tokens())
    outputs.backward(outputs.detach())
    assert found["hidden-covariance"] == pytest.approx(reference_covariance(model.states[0]), rel=1e-6)
    assert found["hidden-covariance-last"] == pytest.approx(reference_covariance(model.states[1]), rel=1e-6)
    hidden = sum(float((h * h.grad).abs().sum()) for states in model.states for h in states)
    assert found["hidden-saliency"] == pytest.approx(hidden, rel=1e-6)
    weights = [p for n, p in model.named_parameters() if p.dim() == 2 and "embedding" not in n]
    assert len(weights) == 5
    saliency = sum(float((w * w.grad).abs().sum()) for w in weights)
    assert found["recurrent-saliency"] == pytest.approx(saliency, rel=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_step_by_step_is_what_the_module_computes(kind, bidirectional, batch_first):
    torch.manual_seed(0)
    module = kind(3, 4, 2, bidirectional=bidirectional, batch_first=batch_first, bias=True)
    x = torch.randn(2, 5, 3)
    layers: list[list[torch.Tensor]] = []
    outputs, last = unrolled(module, x, None, layers)
    expected, expected_last = module(x)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(last, expected_last)
    assert [len(states) for states in layers] == [5 if batch_first else 2] * (4 if bidirectional else 2)
    again, _ = unrolled(module, x, last, [])
    torch.testing.assert_close(again, module(x, last)[0])


class Loop(nn.Module):
    """A recurrence of cells: torch's, or a user's own, which returns a tuple of states."""

    def __init__(self, cell: nn.Module, head: bool = True):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(4, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            h = self.cell(step, h)
            h = h[0] if isinstance(h, tuple) else h
        return self.head(h)


class OwnCell(nn.Module):
    def __init__(self, cell: nn.GRUCell):
        super().__init__()
        self.inputs, self.state = nn.Linear(6, 12), nn.Linear(4, 12)
        with torch.no_grad():
            for ours, kind in ((self.inputs, "ih"), (self.state, "hh")):
                ours.weight.copy_(getattr(cell, f"weight_{kind}"))
                ours.bias.copy_(getattr(cell, f"bias_{kind}"))

    def forward(self, x, h):
        (r, z, n), (r2, z2, n2) = self.inputs(x).chunk(3, 1), self.state(h).chunk(3, 1)
        z = (z + z2).sigmoid()
        return (1 - z) * torch.tanh(n + (r + r2).sigmoid() * n2) + z * h, None


class AllSteps(nn.Module):
    """Returns states of all steps and the last state."""

    def __init__(self, cell: nn.GRUCell):
        super().__init__()
        self.weights = nn.ParameterList([cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh])

    def forward(self, x):
        h, found = x.new_zeros(len(x), 4), []
        for step in x.unbind(1):
            h = torch.gru_cell(step, h, *self.weights)
            found.append(h)
        return torch.stack(found, 1), h


class Outer(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x)[0][:, -1])


def test_cells_and_modules_of_ones_own_are_recognised():
    torch.manual_seed(0)
    cell, x = nn.GRUCell(6, 4), torch.randn(5, 7, 6)
    whole = nn.GRU(6, 4, batch_first=True)
    with torch.no_grad():
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(whole, f"{kind}_l0").copy_(getattr(cell, kind))
    models = [Loop(cell), Loop(OwnCell(cell)), Outer(AllSteps(cell)), Outer(whole)]
    for model in models[1:]:
        model.head.load_state_dict(models[0].head.state_dict())
    h, states = torch.zeros(5, 4), []
    for step in x.unbind(1):
        h = cell(step, h)
        states.append(h)
    expected = reference_covariance([s.double() for s in states])
    found = [score(model, x, NAMES) for model in models]
    for scores in found:
        assert scores["hidden-covariance"] == pytest.approx(expected, rel=1e-4), scores.reasons
    for k in (1, 3):  # the module that returns all states at once shows only what flows through that tensor
        assert found[k]["hidden-saliency"] == pytest.approx(found[0]["hidden-saliency"], rel=1e-4)
    assert 0 < found[2]["hidden-saliency"] < found[0]["hidden-saliency"]


def test_the_innermost_module_counts():
    torch.manual_seed(0)

    class Wrapped(nn.Module):
        """Passes on what an inner recurrent module returns."""

        def __init__(self):
            super().__init__()
            self.inner = nn.GRU(6, 4, batch_first=True)

        def forward(self, x):
            return self.inner(x)

    model, x = Outer(Wrapped()), torch.randn(5, 7, 6)
    found = score(model, x, ["hidden-covariance", "hidden-covariance-last"])
    assert found["hidden-covariance"] == found["hidden-covariance-last"]  # one layer


def test_jacobian_cosine_pair_by_pair():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x = torch.randn(5, 6).double().requires_grad_()
    rows = torch.autograd.grad(model(x).sum(), x)[0].numpy()
    total = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                cosine = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
                total += abs(cosine) ** (1 / 20)
    found = score(model, x.detach(), "jacobian-cosine")["jacobian-cosine"]
    assert found == pytest.approx(1 - total / 2 / (25 - 5), rel=1e-9)


def test_what_is_not_recurrent_says_so():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    for inputs in (torch.randn(5, 6), torch.randn(5, 7, 6)):
        found = score(model, inputs, NAMES)
        assert set(found.reasons.values()) == {"the model has no recurrent layers"}
        assert set(found.reasons) == set(NAMES)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, [7] * len(x), batch_first=True)
            return self.head(self.gru(packed)[1][-1])

    found = score(Packed(), torch.randn(5, 7, 6), NAMES)
    assert "packed" in found.reasons["hidden-covariance"]


def test_a_dead_hidden_unit_has_no_correlation():
    model = nn.Sequential(nn.Embedding(12, 6), nn.RNN(6, 4, nonlinearity="relu", batch_first=True))
    with torch.no_grad():
        for name, parameter in model[1].named_parameters():
            parameter[1] = -1e3 if "bias" in name else 0
    found = score(model, tokens(), "hidden-covariance")
    assert found.reasons["hidden-covariance"] == "a hidden unit is constant or not finite"
