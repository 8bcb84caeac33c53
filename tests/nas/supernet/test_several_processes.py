"""Searches of two processes by torchrun against one with the whole batch. One launch serves all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_searches import CASES, searched, settings
from two_processes import run_in_two

from nas.run import Run
from nas.supernet.search import SearchTask, read_log, search_run
from nas.training.distributed import Processes
from search_spaces.common.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("two")
    run_in_two("distributed_searches.py", found)
    return found


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_both_processes_have_the_same_alphas_and_weights(case, ranks):
    for kind in ("alphas", "weights"):
        for one, other in zip(*(rank[case][kind] for rank in ranks), strict=True):
            assert torch.equal(one, other)
    assert ranks[0][case]["rows"] == ranks[1][case]["rows"]


# The latency that proxylessnas measures is another one each time.
@pytest.mark.parametrize("case", [name for name in CASES if name != "proxylessnas"])
def test_the_search_is_that_of_one_process(case, ranks):
    """float32 sums in another order: a relative error of 1e-7 a step, which six steps let grow a little.

    Adam divides by the size of the gradients, so where these are near zero alphas may differ by more.
    """
    alone = searched(case)
    for found, expected in zip(ranks[0][case]["rows"], alone["rows"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for found, expected in zip(ranks[0][case]["alphas"], alone["alphas"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    for found, expected in zip(ranks[0][case]["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def test_a_run_of_two_processes_is_written_once_and_goes_on(folder):
    run = Run.open(folder / "run")
    assert [row["epoch"] for row in read_log(run)] == [1, 2]
    (trial,) = run.trials()
    assert trial.status == "done"


@pytest.mark.parametrize("name", ["sdarts-adv", "darts-pt", "p-darts"])
def test_what_one_process_must_decide_is_refused_in_several(name, tmp_path):
    task = SearchTask(settings(name), images=100)
    with pytest.raises(UserError, match="one process"):
        search_run(task, tmp_path / "run", processes=Processes(0, 2, 0))
    assert not (tmp_path / "run").exists()
