"""ProxylessNAS: gate gradients against the full mixture, latency against enumeration, its table kept with the run."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from supernet_searches import SPACE, assert_resumes, tiny_search
from torch import nn

from nas.run import Run
from nas.supernet import latency
from nas.supernet.latency import FILE, LatencyTable, expected_latency, measure, read_table, with_latency
from nas.supernet.mixed import Mixed
from nas.supernet.network import Draw, Supernet
from nas.supernet.recipes import recipe, scaled
from nas.supernet.relaxation import BinaryGates, Weights
from nas.supernet.search import SearchTask, read_log, search_run
from nas.supernet.settings import Latency
from nas.supernet.steps import run_epoch
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError

# -- gates ---------------------------------------------------------------------------------------------------------


def test_a_gate_is_one_hot_and_passes_the_softmax_jacobian_on():
    alpha = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    weights = BinaryGates().draw(alpha, torch.Generator().manual_seed(3), 0.0)
    assert weights.gated
    (chosen,) = weights.active
    assert torch.equal(weights.values, torch.eye(4, dtype=torch.float64)[chosen])
    of_gates = torch.tensor([0.5, -2.0, 1.5, 0.25], dtype=torch.float64)
    (found,) = torch.autograd.grad(weights.values, alpha, of_gates)
    p = alpha.detach().softmax(0)
    expected = [sum(of_gates[j] * p[j] * (float(i == j) - p[i]) for j in range(4)) for i in range(4)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_gates_have_their_probabilities():
    alpha, generator, counts = torch.tensor([0.0, 1.0, -0.5]), torch.Generator().manual_seed(0), torch.zeros(3)
    for _ in range(4000):
        counts[BinaryGates().draw(alpha, generator, 0.0).active[0]] += 1
    deviation = (alpha.softmax(0) * (1 - alpha.softmax(0)) / 4000).sqrt()
    assert ((counts / 4000 - alpha.softmax(0)).abs() < 4 * deviation).all()


def test_the_gradient_of_a_network_is_that_of_the_full_mixture_at_one_hot_gates():
    """dL/dg by autograd through all candidates and by finite differences; then the Jacobian of the softmax."""
    _, state = tiny_search("proxylessnas")
    net, batch = state.supernet.double(), state.alpha_batches.batch(0)
    images, alphas = batch.images.double(), net.alphas
    with torch.no_grad():
        for alpha in alphas.values():
            alpha.copy_(torch.randn(len(alpha), dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    net.generator.manual_seed(4)
    draw = net.draw()
    chosen = {label: weights.active[0] for label, weights in draw.weights.items()}
    assert len(set(chosen.values())) > 2

    def loss(draw: Draw) -> torch.Tensor:
        return nn.functional.cross_entropy(net(images, draw=draw), batch.labels)

    value = loss(draw)
    found = torch.autograd.grad(value, list(alphas.values()))
    gates = {k: torch.eye(5, dtype=torch.float64)[c].requires_grad_() for k, c in chosen.items()}
    mixture = loss(Draw({label: Weights(g) for label, g in gates.items()}, {}))
    assert mixture.item() == pytest.approx(value.item(), rel=1e-12)
    slopes = torch.autograd.grad(mixture, list(gates.values()))
    for alpha, slope, ours in zip(alphas.values(), slopes, found):
        torch.testing.assert_close(ours, torch.func.jacrev(lambda a: a.softmax(0))(alpha.detach()).T @ slope)
    label = "edge_0_3"
    for k in (2, 3):
        sides = []
        for step in (1e-5, -1e-5):
            moved = gates[label].detach().clone()
            moved[k] += step
            others = {name: Weights(g.detach()) for name, g in gates.items()}
            sides.append(loss(Draw({**others, label: Weights(moved)}, {})).item())
        assert slopes[net.labels.index(label)][k].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-7)
    assert max(slope.abs().max().item() for slope in slopes) > 1e-3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gated_mixture_is_its_path_and_keeps_nothing_of_the_others(checkpointed):
    torch.manual_seed(0)
    candidates = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4)) for _ in range(3)]
    mixed, x = Mixed(candidates, "place", partial=2, checkpointed=checkpointed), torch.randn(2, 8, 5, 5)
    expected = Mixed(copy.deepcopy(candidates), "place", partial=2)
    expected.selected = 1
    with_gradient = []
    for k, candidate in enumerate(mixed.candidates):
        candidate.register_forward_hook(lambda *_, k=k: with_gradient.append((k, torch.is_grad_enabled())))
    gates = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    mixed.weights = Weights(gates, (1,), gated=True)
    y = mixed(x)
    assert torch.equal(y, expected(x))
    assert sorted(with_gradient) == [(0, False), (1, True), (2, False)]
    y.square().sum().backward()
    assert (gates.grad != 0).all()
    assert [any(p.grad is not None for p in c.parameters()) for c in mixed.candidates] == [False, True, False]
    for weights in (Weights(gates.detach(), (1,), gated=True), Weights(gates, (1,))):
        with_gradient.clear()
        mixed.weights = weights
        mixed(x)
        assert [k for k, _ in with_gradient] == [1]


def test_alphas_move_after_the_warm_up_in_every_fifth_step():
    changes = {"alpha_every": 5, "alpha_warmup_epochs": 1, "epochs": 3}
    found, state = tiny_search("proxylessnas", images=210, **changes)
    assert state.batches.steps_per_epoch == 6
    taken, before = [], [a.detach().clone() for a in state.supernet.alphas.values()]
    for _ in range(3):
        means = run_epoch(state, found)
        steps = [int(entry["step"]) for entry in state.alpha_optimizer.state.values()]
        taken.append(max(steps, default=0))
        assert ("alpha_loss" in means) == (len(taken) > 1)
        same = all(torch.equal(a, b) for a, b in zip(before, state.supernet.alphas.values()))
        assert same == (len(taken) == 1)
    assert taken == [0, 1, 2]  # of steps 7 to 12 the 10th, of 13 to 18 the 15th


# -- latency -------------------------------------------------------------------------------------------------------

TABLE = LatencyTable({"a": [1.0, 3.0], "b": [0.5, 0.0, 2.0], "c": [4.0, 1.0]}, 0.75)
ALPHAS = {"a": [0.2, -0.3], "b": [1.0, 0.0, -1.0], "c": [0.5, 0.5]}


def test_expected_latency_is_the_mean_over_all_networks():
    alphas = {label: torch.tensor(values, dtype=torch.float64) for label, values in ALPHAS.items()}
    total = 0.0
    for path in itertools.product(range(2), range(3), range(2)):
        share = math.prod(float(a.softmax(0)[k]) for a, k in zip(alphas.values(), path))
        total += share * (0.75 + sum(TABLE.labels[label][k] for label, k in zip(alphas, path)))
    assert expected_latency(TABLE, alphas).item() == pytest.approx(total, rel=1e-12)


def test_both_forms_of_the_loss():
    loss, ms = torch.tensor(2.3, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)
    expected = 0.2 * 2.3 * (math.log(5000) / math.log(8000)) ** 0.3
    assert with_latency(loss, ms, 8.0, Latency()).item() == pytest.approx(expected, rel=1e-12)
    linear = with_latency(loss, ms, 8.0, Latency(form="add_linear"))
    assert linear.item() == pytest.approx(2.3 + 0.1 * (5 - 8) / 8, rel=1e-12)
    with pytest.raises(UserError, match="mul-log"):
        Latency(form="mul")


@pytest.mark.parametrize("form", ["mul-log", "add-linear"])
def test_alphas_are_drawn_to_what_is_fast(form):
    alphas = {label: torch.tensor(values, requires_grad=True) for label, values in ALPHAS.items()}
    loss = with_latency(torch.tensor(1.0), expected_latency(TABLE, alphas), 5.0, Latency(form=form))
    loss.backward()
    for label, alpha in alphas.items():
        fastest = min(range(len(alpha)), key=TABLE.labels[label].__getitem__)
        assert alpha.grad[fastest] < 0
        assert alpha.grad[max(range(len(alpha)), key=TABLE.labels[label].__getitem__)] > 0


class Slow(nn.Module):
    """Takes `cost` of a clock's time for every value that passes."""

    def __init__(self, clock: list[float], cost: float, stride: int = 1):
        super().__init__()
        self.clock, self.cost, self.stride = clock, cost, stride

    def forward(self, x):
        self.clock[0] += self.cost * x.numel()
        return x[:, :, :: self.stride, :: self.stride]


class Network(nn.Module):
    """The label `a` at two places with inputs of 64 and 16 values, `b` between them; 7 a pass for the rest."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.first = Choice([Slow(clock, 1), Slow(clock, 2)], "a")
        self.between = Choice([Slow(clock, 0, 2), Slow(clock, 5, 2)], "b")
        self.second = Choice([Slow(clock, 1), Slow(clock, 2)], "a")
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        self.clock[0] += 7
        return self.norm(self.second(self.between(self.first(x)))).flatten(1)


def test_the_table_has_what_each_candidate_takes_at_its_places(monkeypatch):
    clock = [0.0]
    net = Supernet(Network(clock), BinaryGates(), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0] / 1000)
    before, random = copy.deepcopy(net.state_dict()), net.generator.get_state()
    table = measure(net, (1, 1, 8, 8), repeats=3)
    assert table.labels == {"a": pytest.approx([64 + 16, 128 + 32]), "b": pytest.approx([0, 5 * 64])}
    assert table.rest_ms == pytest.approx(7)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net.generator.get_state(), random)
    assert net.training
    assert not net.fixed


def test_choices_within_choices_are_refused():
    inner = nn.Sequential(Choice([nn.Identity(), nn.ReLU()], "inner"))
    net = Supernet(nn.Sequential(Choice([inner, nn.Identity()], "outer")), BinaryGates(), generator=torch.Generator())
    with pytest.raises(UserError, match="outer"):
        measure(net, (1, 1, 4, 4))


def quick(**changes) -> SearchTask:
    small = {"channels": 4, "batch_size": 16, "epochs": 2, "alpha_warmup_epochs": 0, "drop_last": True}
    found = scaled(recipe("proxylessnas"), "tiny", flip=False).replaced({**small, "latency_repeats": 1, **changes})
    return SearchTask(found, images=40)


def test_a_run_measures_once_and_keeps_the_table(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(row):
        raise Killed

    with pytest.raises(Killed):
        search_run(quick(), tmp_path / "run", seeds=(0, 1), on_epoch=kill)
    table = read_table(tmp_path / "run" / FILE)
    assert {label: len(values) for label, values in table.labels.items()} == {f"edge_{e}": 5 for e in EDGES}
    assert tuple(table.input) == (1, 1, 8, 8)
    assert all(value > 0 for values in table.labels.values() for value in values)
    monkeypatch.setattr(latency, "measure", None)  # not again
    run = search_run(quick(), tmp_path / "run", seeds=(0, 1))
    assert [t.status for t in run.trials()] == ["done", "done"]
    for row in read_log(run):
        logarithms = {label: torch.tensor(shares).log() for label, shares in row["alphas"].items()}
        assert row["expected_latency_ms"] == pytest.approx(float(expected_latency(table, logarithms)), rel=1e-5)


EDGES = ("0_1", "0_2", "1_2", "0_3", "1_3", "2_3")


def test_a_given_table_is_used_and_one_that_does_not_fit_is_refused(tmp_path):
    times = {f"edge_{e}": [0.1, 9.0, 9.0, 9.0, 9.0] for e in EDGES}
    file = tmp_path / "phone.json"
    file.write_text(json.dumps(LatencyTable(times, 0.4, "phone").as_json()))
    changes = {"latency_file": str(file), "latency_form": "add-linear", "latency_weight": 1e4, "alpha_rate": 0.5}
    run = search_run(quick(**changes), tmp_path / "run")
    assert read_table(run.path / FILE).device == "phone"
    assert SPACE.decode(run.trials()[0].arch) == (0,) * 6  # the fastest network, as latency is all that counts
    reference = 0.4 + 6 * sum(times["edge_0_1"]) / 5
    assert read_log(run)[0]["expected_latency_ms"] < 0.9 * reference
    for content, named in (
        ({**LatencyTable(times, 0.4).as_json(), "format": 2}, "format 1"),
        (LatencyTable({**times, "edge_0_3": [1.0]}, 0.4).as_json(), "'edge_0_3': .*5 candidates"),
        (LatencyTable({label: [0.0] * 5 for label in times}, 0.0).as_json(), "above 0"),
        ("nonsense", "table of latencies"),
        ({"format": 1, "labels": {"edge_0_1": 3.0}, "rest_ms": 1.0}, "a list for each"),
    ):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=named):
            search_run(quick(latency_file=str(file)), tmp_path / "other")
    with pytest.raises(UserError, match="milliseconds"):
        LatencyTable({"a": [-1.0]}, 0.0)
    assert not Run.open(tmp_path / "other").trials()


def test_it_resumes_bit_for_bit(tmp_path):
    file = tmp_path / "table.json"
    times = {f"edge_{e}": [0.1, 0.2, 0.3, 0.4, 0.5] for e in EDGES}
    file.write_text(json.dumps(LatencyTable(times, 0.4).as_json()))
    assert_resumes("proxylessnas", latency_file=str(file))
