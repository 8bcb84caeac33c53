"""Two processes by torchrun against one with the whole batch. One launch serves all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_trainings import CASES, PLAIN, UNEVEN, cell, run_task, trained
from small_trainings import equal, network, outcome, patterns
from two_processes import run_in_two

from nas.training.checkpoints import load_state
from nas.training.distributed import ALONE, joined
from nas.training.loop import start
from nas.training.runs import train_run
from search_spaces.common.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("two")
    run_in_two("distributed_trainings.py", found)
    return found


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As in the processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", [c for c in CASES if c != "batch-norm"])
def test_the_result_is_that_of_one_process(case, ranks):
    """float32 sums in another order: a relative error of 1e-7 a step, which 11 steps of training let grow a little.

    Dead edges, an auxiliary head that is or is not used, mixing, clipping and an uneven last batch included.
    """
    alone = trained(case)
    for rank in ranks:
        found = rank[case]
        assert found["losses"] == pytest.approx(alone["losses"], rel=2e-5)
        for name, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-3, atol=2e-5, msg=name)
        assert found["val"]["loss"] == pytest.approx(alone["val"]["loss"], rel=1e-4)
        assert found["val"]["count"] == 45
        assert found["hits"] == alone["hits"]
    assert equal(ranks[0][case], ranks[1][case])


def test_dead_edges_stay_as_they_began(ranks):
    """Without a gradient nothing decays either, in any number of processes."""
    initial = cell().state_dict()
    dead = [name for name in initial if "edges.0.conv" in name]
    assert len(dead) == 3
    for name in dead:
        assert torch.equal(ranks[1]["group-norm"]["weights"][name], initial[name])


def test_batch_norm_sees_its_share(ranks):
    """Each process normalises its own images, so the losses are near those of one process, not equal; weights agree
    among processes; running statistics are those of rank 0, and evaluation gives every process the same."""
    alone = trained("batch-norm")
    first, second = (rank["batch-norm"] for rank in ranks)
    assert first["losses"] == second["losses"]
    assert first["losses"] != pytest.approx(alone["losses"], rel=1e-5)
    assert first["losses"] == pytest.approx(alone["losses"], rel=0.3)
    parameters = {n for n, _ in CASES["batch-norm"][0]().named_parameters()}
    statistics = [n for n in first["own"] if "running" in n]
    assert all(torch.equal(first["own"][n], second["own"][n]) for n in parameters)
    assert not all(torch.equal(first["own"][n], second["own"][n]) for n in statistics)
    assert all(torch.equal(first["own"][n], second["weights"][n]) for n in statistics)
    assert first["val"] == second["val"]


def test_going_on_is_bit_identical_with_dropout_of_each_rank(ranks):
    for rank in ranks:
        straight, resumed = rank["resumed"]["straight"], rank["resumed"]["resumed"]
        # BatchNorm's last update is the rank's own; everything else is equal, the generators of both ranks too.
        for found in (straight, resumed):
            found.pop("seconds")
        assert equal(straight, resumed)
    own = ranks[0]["resumed"]["straight"]["random"]
    assert not torch.equal(own[0]["cpu"], own[1]["cpu"])


def test_a_checkpoint_of_two_is_refused_by_one(folder, ranks):
    with pytest.raises(UserError, match="1 processes.*as many as wrote .*half.pt, 2"):
        load_state(folder / "half.pt", network(), patterns(UNEVEN), PLAIN)


def test_a_run_of_two_processes(folder, ranks, tmp_path):
    """Interrupted, its last checkpoint damaged: the same as straight through; told by the leader alone."""
    whole, broken = outcome(folder / "whole"), outcome(folder / "broken")
    first = [row for row in broken["curves"] if row["seed"] == 0]
    assert first == whole["curves"]
    assert broken["weights"]["seed-0.safetensors"] == whole["weights"]["seed-0.safetensors"]
    assert broken["metrics"][0] == whole["metrics"][0]
    assert [t[1:3] for t in broken["trials"]] == [(0, "done"), (4, "done")]
    assert "is damaged; going back to" in (folder / "told-0").read_text()
    assert (folder / "told-1").read_text() == ""
    alone = outcome(train_run(run_task(), tmp_path / "run").path)
    assert [r["epoch"] for r in alone["curves"]] == [r["epoch"] for r in whole["curves"]]


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert processes is ALONE
    assert ALONE.leads
    assert ALONE.gather(3) == [3]
    assert ALONE.first(3) == 3
    assert torch.equal(ALONE.total(torch.ones(2)), torch.ones(2))
    ALONE.wait()
    assert not isinstance(start(cell(), patterns(), PLAIN, seed=0).forward, torch.nn.parallel.DistributedDataParallel)
