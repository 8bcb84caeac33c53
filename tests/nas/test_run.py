"""Run folders: what is written, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_space
from small_space import Digits

from nas.loop import search
from nas.run import Run, find_runs
from search_spaces.common.errors import RunError, UserError

SUPPORT = Path(__file__).parents[1] / "support"


def run_search(out, **changes):
    arguments = {"strategy": "regularized-evolution", "budget": 40, "objectives": "val_acc", "seed": 3, **changes}
    return search(Digits(), small_space.slow_score, out=out, **arguments)


def essence(run: Run) -> list[tuple]:
    return [(t.id, t.arch, t.key, t.status, t.fidelity, t.metrics, t.parent, t.seed) for t in run.trials()]


def test_a_run_keeps_what_happened(tmp_path):
    result = run_search(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.settings["seed"] == 3
    assert essence(run) == [
        (r.id, r.arch, r.key, r.status, r.fidelity, r.metrics, r.parent, r.seed) for r in result.records
    ]
    assert run.events() == [event for i in range(40) for event in (("ask", i), ("tell", i))]
    assert run.trial(17).id == 17
    assert [r.path for r in find_runs(tmp_path)] == [tmp_path / "run"]
    assert not run.running()
    with sqlite3.connect(tmp_path / "run" / "trials.sqlite") as database:
        assert database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_the_same_search_is_not_done_twice_and_a_larger_budget_goes_on(tmp_path):
    first = run_search(tmp_path / "run")
    again = run_search(tmp_path / "run")
    assert [r.told_at for r in first.records] == [r.told_at for r in again.records]
    longer = run_search(tmp_path / "run", budget=60)
    assert len(longer.records) == 60
    assert [r.arch for r in longer.records] == [r.arch for r in run_search(tmp_path / "other", budget=60).records]


def test_other_settings_are_listed(tmp_path):
    run_search(tmp_path / "run", budget=3)
    with pytest.raises(UserError, match="seed was 3, now 4"):
        run_search(tmp_path / "run", budget=3, seed=4)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="settings.json"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="new or empty folder"):
        run_search(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_nearest_run_is_suggested(tmp_path):
    run_search(tmp_path / "first-run", budget=2)
    with pytest.raises(UserError, match="did you mean .*first-run"):
        Run.open(tmp_path / "frist-run")


def test_a_newer_format_is_refused(tmp_path):
    run_search(tmp_path / "run", budget=2)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    (tmp_path / "run" / "settings.json").write_text(json.dumps({**settings, "format": 99}))
    with pytest.raises(UserError, match="format 1 or older"):
        Run.open(tmp_path / "run")


def test_a_running_search_locks_its_run(tmp_path):
    run_search(tmp_path / "run", budget=2)
    run = Run.open(tmp_path / "run")
    with run.writing():
        assert run.running()
        with pytest.raises(UserError, match="a search runs there"):
            run_search(tmp_path / "run", budget=5)
    run_search(tmp_path / "run", budget=5)


@pytest.mark.parametrize("damage", ["header", "middle", "empty"])
def test_a_corrupted_database_is_named(tmp_path, damage):
    run_search(tmp_path / "run", budget=30)
    file = tmp_path / "run" / "trials.sqlite"
    content = bytearray(file.read_bytes())
    if damage == "header":
        content[:64] = b"x" * 64
    elif damage == "middle":
        content[1024:] = os.urandom(len(content) - 1024)
    else:
        content = content[:2000]
    file.write_bytes(content)
    with pytest.raises(UserError, match="trials.sqlite"):
        run_search(tmp_path / "run", budget=40)


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    run_search(tmp_path / "run", budget=2)
    real = os.access  # root may write anywhere, so the answer is simulated
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    with pytest.raises(UserError, match="can be written"):
        run_search(tmp_path / "run", budget=5)


def test_a_full_disk_stops_the_run_and_keeps_it_valid(tmp_path, monkeypatch):
    run_search(tmp_path / "run", budget=5)
    real = Run.add_tell
    told = []

    def full(self, record):
        told.append(record.id)
        if len(told) == 4:
            self._database.execute("PRAGMA max_page_count = 1")  # SQLite's own way to have no room
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            record = type(record)(*[getattr(record, f) for f in record.__slots__[:6]], "x" * 500_000)
        real(self, record)

    monkeypatch.setattr(Run, "add_tell", full)
    with pytest.raises(RunError, match="full.*nas resume"):
        run_search(tmp_path / "run", budget=40)
    monkeypatch.undo()
    assert len(run_search(tmp_path / "run").records) == 40
    run_search(tmp_path / "whole")
    assert essence(Run.open(tmp_path / "run")) == essence(Run.open(tmp_path / "whole"))


def test_a_strategy_that_changed_is_noticed(tmp_path):
    run_search(tmp_path / "run", budget=5)
    with sqlite3.connect(tmp_path / "run" / "trials.sqlite") as database:
        database.execute("UPDATE trials SET arch = '000' WHERE id = 2")
    with pytest.raises(RunError, match="trial 2"):
        run_search(tmp_path / "run", budget=9)


def killed_and_resumed(tmp_path: Path, kills: int, workers: int, queries: int, rng: random.Random) -> tuple[Run, list]:
    """Kill a search at random moments until it has been killed `kills` times, then let it finish."""
    log = tmp_path / "evaluations.jsonl"
    program = (
        "import small_space\nfrom nas.loop import search\n"
        "if __name__ == '__main__':\n"
        f"    search(small_space.Digits(), small_space.logged_score, 'regularized-evolution', budget={queries},"
        f" objectives='val_acc', seed=5, workers={workers}, out={str(tmp_path / 'run')!r})\n"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "NASFORGE_TEST_LOG": str(log)}
    log.touch()
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL)
        before = log.stat().st_size
        deadline = time.monotonic() + 60
        while log.stat().st_size == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)  # it has begun to evaluate
        time.sleep(rng.random() * 0.08)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=120)
    return Run.open(tmp_path / "run"), [json.loads(line) for line in log.read_text().splitlines()]


def check_killed_serial(tmp_path: Path, kills: int, seed: int) -> None:
    queries = 120
    run, evaluations = killed_and_resumed(tmp_path, kills, 1, queries, random.Random(seed))
    whole = search(Digits(), small_space.score, "regularized-evolution", budget=queries, objectives="val_acc", seed=5)
    assert [(t.id, t.arch, t.metrics, t.parent) for t in run.trials()] == [
        (r.id, r.arch, r.metrics, r.parent) for r in whole.records
    ]
    assert queries <= len(evaluations) <= queries + kills  # at most the one under way is evaluated again
    asks = [id for kind, id in run.events() if kind == "ask"]
    tells = [id for kind, id in run.events() if kind == "tell"]
    assert asks == tells == list(range(queries))


def test_killed_three_times_equals_the_undisturbed_run(tmp_path):
    check_killed_serial(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_killed_twenty_times_equals_the_undisturbed_run(tmp_path):
    check_killed_serial(tmp_path, 20, seed=1)


def test_killed_with_four_workers_loses_and_doubles_nothing(tmp_path):
    run, evaluations = killed_and_resumed(tmp_path, 2, 4, 60, random.Random(2))
    trials = run.trials()
    assert [t.id for t in trials] == list(range(60))
    assert {t.status for t in trials} == {"done"}
    assert len({t.key for t in trials}) == 60
    assert sorted(id for kind, id in run.events() if kind == "tell") == list(range(60))
    assert all(t.metrics["val_acc"] == sum(map(int, t.arch)) for t in trials)
    assert len(evaluations) <= 60 + 2 * 4  # what was told before a kill is not evaluated again
