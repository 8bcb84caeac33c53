"""Decisions by perturbation: against brute force, where the useful candidate is planted, resumed, and their order."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nas.supernet.building import make_supernet, search_data
from nas.supernet.edges import edges_into_nodes
from nas.supernet.network import Supernet
from nas.supernet.projection import Decision, decide, decisions_of
from nas.supernet.reading import read_off
from nas.supernet.recipes import recipe, scaled
from nas.supernet.relaxation import Softmax
from nas.supernet.search import SearchTask, open_supernet, read_log, search_run
from nas.supernet.state import start
from nas.supernet.steps import run_epoch
from nas.training.checkpoints import checkpoints, read
from nas.training.data import Dataset, Split, load_data
from search_spaces.cells.darts_network import OPERATIONS
from search_spaces.cells.operations import Zero
from search_spaces.choice import Choice
from search_spaces.registry import load_space

SPACE, DARTS = load_space("nas-bench-201"), load_space("darts")
SMALL = {"channels": 4, "batch_size": 16, "epochs": 1, "drop_last": True}
FOUND = scaled(recipe("darts-pt"), "tiny", flip=False).replaced(SMALL)


def searched(space, images: int, epochs: int = 1):
    """A state, by default after an epoch, and its data."""
    data = search_data(load_data("digits", val_share=0.0), FOUND, images=images, seed=0)
    state = start(make_supernet(space, FOUND, data, seed=0), data, FOUND, seed=0)
    for _ in range(epochs):
        run_epoch(state, FOUND)
    return state, data


def accuracy_with_zeros(supernet: Supernet, data: Dataset, label: str, replaced) -> tuple[float, float]:
    """(acc, -loss) by each batch's statistics of a copy in which candidates of a label are modules that give zeros."""
    net = copy.deepcopy(supernet).train()
    for place in net._mixed[label]:
        stride = 2 if label.startswith("reduce") and label.split("_")[1] in "01" else 1
        for k in replaced:
            place.candidates[k] = Zero(stride)
    with torch.no_grad():
        outputs = net(data.normalize(data.val.images))
    loss = nn.functional.cross_entropy(outputs, data.val.labels)
    return float((outputs.argmax(1) == data.val.labels).float().mean()), -float(loss)


def test_a_decision_is_the_one_of_brute_force():
    state, data = searched(SPACE, 100)
    before = copy.deepcopy(state.supernet.state_dict())
    for label in ("edge_0_3", "edge_1_2"):
        expected = [accuracy_with_zeros(state.supernet, data, label, (k,)) for k in range(5)]
        row = decide(state, data, FOUND, SPACE, Decision(label))
        assert [row["without"][str(k)] for k in range(5)] == pytest.approx([100 * acc for acc, _ in expected])
        assert row["kept"] == min(range(5), key=lambda k: expected[k])
        assert state.supernet.kept[label] == (row["kept"],)
        # The next decision sees what was decided: only that candidate, at weight one.
        weights = state.supernet.draw().weights[label].values
        assert weights.tolist() == [float(k == row["kept"]) for k in range(5)]
    assert all(torch.equal(value, before[name]) for name, value in state.supernet.state_dict().items())
    assert len(set(expected)) > 1


class Planted(nn.Module):
    """Two places of three candidates each; the label is the largest of ten inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = Choice([self._noise(), self._linear(torch.eye(10)), self._noise()], "first")
        self.second = Choice([self._noise(), self._noise(), self._linear(torch.eye(10).flip(1))], "second")

    @staticmethod
    def _linear(matrix: torch.Tensor) -> nn.Module:
        found = nn.Linear(10, 10, bias=False)
        found.weight.data = matrix
        return found

    def _noise(self) -> nn.Module:
        return self._linear(0.1 * torch.randn(10, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        # Half of the classes are right by the first place, half by the second.
        return torch.cat([self.first(x)[:, :5], self.second(x).flip(1)[:, 5:]], dim=1)


def test_the_planted_candidates_are_found_though_others_have_larger_alphas():
    supernet = Supernet(Planted(), Softmax(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        supernet.alphas["first"].copy_(torch.tensor([0.5, 0.0, 0.2]))
        supernet.alphas["second"].copy_(torch.tensor([0.0, 0.5, 0.1]))
    images = torch.randn(400, 1, 1, 10, generator=torch.Generator().manual_seed(1))
    labels = images.flatten(1).argmax(1)
    digits = load_data("digits")
    part = Split(images, labels)
    data = copy.copy(digits)
    for name in ("train", "val"):
        object.__setattr__(data, name, part)
    object.__setattr__(data, "mean", (0.0,))
    object.__setattr__(data, "std", (1.0,))
    state = start(supernet, data, FOUND, seed=0)
    for seed in (0, 1):  # both orders, unless they are one
        supernet.kept.clear()
        for decision in decisions_of(SPACE, supernet.labels, seed):
            decide(state, data, FOUND, SPACE, decision)
        assert supernet.kept == {"first": (1,), "second": (2,)}


def test_in_darts_operations_are_no_none_and_nodes_keep_two_edges_by_brute_force():
    state, data = searched(DARTS, 40, epochs=0)
    supernet = state.supernet
    label = "reduce_1_4"
    expected = {k: accuracy_with_zeros(supernet, data, label, (k,)) for k in range(1, 8)}
    row = decide(state, data, FOUND, DARTS, Decision(label))
    assert list(row["without"]) == [str(k) for k in range(1, 8)]
    assert row["kept"] == min(expected, key=lambda k: expected[k])
    edges = edges_into_nodes(supernet.labels)["normal_3"]
    drops = {edge: accuracy_with_zeros(supernet, data, edge, range(8)) for edge in edges}
    row = decide(state, data, FOUND, DARTS, Decision("normal_3", edges))
    assert set(row["kept"]) == set(sorted(edges, key=lambda edge: drops[edge])[:2])
    assert [supernet.kept.get(edge) == (0,) for edge in edges] == [edge not in row["kept"] for edge in edges]
    genotype = read_off(DARTS, supernet, FOUND)
    assert {f"normal_{source}_3" for _, source in genotype.normal[2:4]} == set(row["kept"])
    assert OPERATIONS[supernet.kept[label][0]] in OPERATIONS[1:]


def test_every_label_is_decided_once_in_the_order_of_the_seed():
    labels = list(SPACE.select((0,) * 6))
    orders = [[d.name for d in decisions_of(SPACE, labels, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(labels)
    cells = [f"{part}_{s}_{n}" for part in ("normal", "reduce") for n in range(2, 6) for s in range(n)]
    found = decisions_of(DARTS, cells, 3)
    assert sorted(d.name for d in found[:28]) == sorted(cells)
    assert all(not d.edges for d in found[:28])
    assert {d.name for d in found[28:]} == {f"{p}_{n}" for p in ("normal", "reduce") for n in (3, 4, 5)}  # 2 has two
    assert sum(len(d.edges) for d in found) == 2 * (3 + 4 + 5)


class Killed(Exception):
    pass


def test_killed_between_and_within_decisions_it_goes_on_bit_for_bit(tmp_path):
    task = SearchTask(FOUND.replaced({"projection_epochs": 2}), images=70)  # two steps an epoch
    whole = search_run(task, tmp_path / "whole")
    for step in (3, 22):  # within an epoch; after the last, before the last decision

        def progress(done: int, total: int | None, step: int = step) -> None:
            assert total == 2 * (1 + 2 * 5)
            if done == step:
                raise Killed

        with pytest.raises(Killed):
            search_run(task, tmp_path / "killed", progress=progress)
    again = search_run(task, tmp_path / "killed")
    rows = [[{k: v for k, v in r.items() if k != "seconds"} for r in read_log(run)] for run in (whole, again)]
    assert rows[0] == rows[1]
    assert [t.arch for t in whole.trials()] == [t.arch for t in again.trials()]
    contents = [read(checkpoints(run.path / "checkpoints" / "seed-0")[0])["supernet"] for run in (whole, again)]
    assert all(torch.equal(contents[0][name], contents[1][name]) for name in contents[0])

    decided = [row for row in rows[0] if "decided" in row]
    assert [row["epoch"] for row in decided] == [1, 3, 5, 7, 9, 11]
    tuned = [row for row in rows[0] if "decided" not in row][1:]
    rate = FOUND.training.learning_rate / 10
    assert tuned[0]["learning_rate"] == pytest.approx(rate)
    assert np.all(np.diff([row["learning_rate"] for row in tuned]) < 0)
    assert tuned[-1]["learning_rate"] > FOUND.training.final_rate
    for before, after in itertools.pairwise(rows[0]):  # alphas stay; a decided edge has one candidate
        changed = [label for label in before["alphas"] if before["alphas"][label] != after["alphas"][label]]
        assert changed == ([after["decided"]] if "decided" in after else [])
        if "decided" in after:
            assert after["alphas"][after["decided"]] == [float(k == after["kept"]) for k in range(5)]
    _, state, _ = open_supernet(again)
    assert {label: kept[0] for label, kept in state.supernet.kept.items()} == SPACE.select(
        SPACE.decode(again.trials()[0].arch)
    )


def test_fixed_alphas_stay_uniform(tmp_path):
    run = search_run(SearchTask(FOUND.replaced({"projection_fixed_alphas": True}), images=40), tmp_path / "run")
    first = read_log(run)[0]
    assert all(values == pytest.approx([0.2] * 5, abs=1e-7) for values in first["alphas"].values())
    assert "alpha_loss" not in first
