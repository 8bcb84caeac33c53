"""Ranking consistency: how well the accuracies with shared weights rank the architectures of a table."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.columns import parse_column
from benchmarks.table import Table
from nas.evaluators import reference_metric
from nas.objectives import MAXIMIZED_ENDINGS
from nas.run import Run
from nas.scoring.correlation import ProxyCorrelation, correlate, with_counts
from nas.scoring.many import ScoreTable
from nas.supernet.evolution import RECALIBRATION
from nas.supernet.trained import TrainedSupernet, open_trained, seeds_of
from nas.training.data import Split
from search_spaces.common.errors import RunError, UserError, one_of
from search_spaces.common.files import atomic_write, locked
from search_spaces.common.names import nearest
from search_spaces.registry import load_space

SCORE = "supernet"  # the name under which shared accuracies stand among other scores
COUNTS = ("params", "macs", "live-macs")
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class Ranking:
    """archs: [N] in the space's notation. seeds: [K]. accuracies: percent with shared weights [N, K]. truth: [N].

    metric: what of the table the truth is. each: how the accuracies of one seed rank it; mean: every statistic's mean
    over the seeds; counts: the same of `params`, `macs` and `live-macs`, to compare with (empty for a space that states
    no costs). epochs: how many of the search are done, by seed.
    """

    archs: tuple[str, ...]
    seeds: tuple[int, ...]
    accuracies: np.ndarray
    truth: np.ndarray
    metric: str
    each: dict[int, ProxyCorrelation]
    mean: ProxyCorrelation
    counts: dict[str, ProxyCorrelation]
    epochs: dict[int, int]

    def as_json(self) -> dict[str, Any]:
        """Plain values, without those of each architecture."""
        return {
            "metric": self.metric,
            "n": len(self.archs),
            "mean": self.mean.as_json(),
            "seeds": {str(s): {**found.as_json(), "epochs": self.epochs[s]} for s, found in self.each.items()},
            "counts": {name: found.as_json() for name, found in self.counts.items()},
        }

    def columns(self) -> dict[str, list[Any]]:
        """`arch`, `seed_<k>` in percent for each seed, their mean `supernet`, and the table's metric."""
        by_seed = {f"seed_{seed}": self.accuracies[:, k].tolist() for k, seed in enumerate(self.seeds)}
        mean = self.accuracies.mean(1).tolist()
        return {"arch": list(self.archs), **by_seed, SCORE: mean, self.metric: self.truth.tolist()}


def rank(
    run: Run,
    table: Table,
    rng: np.random.Generator,
    *,
    sample: int | None = None,
    metric: str | None = None,
    seeds: Sequence[int] | None = None,
    images: int | None = None,
    device: str = "cpu",
    resamples: int = 200,
    progress: Progress | None = None,
) -> Ranking:
    """Score `sample` architectures of a table (None: one of every key) in a run's supernets, those of all its seeds.

    seeds: of the search, to take only these. An architecture's score is its accuracy with the weights it shares, on
    the images of the alphas (at most `images`), BatchNorm's statistics taken on those of the weights (`path_accuracy`).
    Regrets are against the best of the sample, and intervals of a mean are over architectures, not over seeds. metric:
    see `reference_values`. rng: draws the architectures, then the `resamples` bootstrap samples of them behind the 95 %
    intervals. Scores are kept in the run's folder, so that the same call goes on where it was interrupted, and a larger
    sample of the same rng begins with a smaller one. progress: (scored, all).
    Errors: UserError for another kind of run, a table of another space, a sample larger than the table, seeds that
    were not searched with, no checkpoint, a metric that not every architecture has.
    """
    wanted = tuple(seeds_of(run) if seeds is None else seeds)
    if not wanted or len(set(wanted)) != len(wanted):
        raise UserError(list(wanted), "seeds of the search that differ, at least one")
    space = load_space(run.settings["space"])
    if space.name != table.space.name:
        raise UserError(table.id, f"a table of the space of {run.path}, {space.name}")
    if images is not None and images < 1:
        raise UserError(images, "a positive number of images")
    draw, resample = rng.spawn(2)
    rows = sample_distinct(table, sample, draw)
    truth, metric = reference_values(table, rows, metric)
    archs = tuple(space.encode(table.arch(int(row))) for row in rows)
    columns, epochs = [], {}
    for k, seed in enumerate(wanted):
        trained = open_trained(run, seed, device)
        columns.append(score(trained, archs, images, _part(progress, k * len(archs), len(wanted) * len(archs))))
        epochs[seed] = trained.epochs
    accuracies = np.stack(columns, 1)
    state = int(resample.integers(2**62))  # every row is of the same bootstrap samples

    def statistics(scores: ScoreTable) -> dict[str, ProxyCorrelation]:
        return correlate(scores, truth, np.random.default_rng(state), resamples=resamples)

    whole = ScoreTable(archs, (SCORE,), wanted, accuracies[:, None, :])
    alone = [ScoreTable(archs, (SCORE,), (seed,), accuracies[:, None, k : k + 1]) for k, seed in enumerate(wanted)]
    with contextlib.suppress(UserError):  # a space that states no costs
        whole = with_counts(whole, space)
    found = statistics(whole)
    each = {seed: statistics(scores)[SCORE] for seed, scores in zip(wanted, alone, strict=True)}
    counts = {name: found[name] for name in COUNTS if name in found}
    return Ranking(archs, wanted, accuracies, truth, metric, each, found[SCORE], counts, epochs)


def sample_distinct(table: Table, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """`count` rows of a table in the order drawn, their architectures distinct by the space's key; None for all keys.

    Of the same rng a smaller sample is the beginning of a larger one. Errors: UserError for fewer than two, or more
    than there are.
    """
    if count is not None and count < 2:
        raise UserError(count, "a sample of at least two architectures")
    rows: dict[str, int] = {}
    for row in rng.permutation(len(table)):
        if count is not None and len(rows) == count:
            break
        rows.setdefault(table.space.key(table.arch(int(row))), int(row))
    if count is not None and len(rows) < count:
        raise UserError(count, f"a sample of at most {len(rows):,}, the different architectures of {table.id}")
    return np.array(list(rows.values()))


def reference_values(table: Table, rows: np.ndarray, metric: str | None = None) -> tuple[np.ndarray, str]:
    """(values [rows], metric) of a quality in a table, higher is better, after the longest training.

    metric: default the test accuracy where the table has test values, else the validation accuracy. Test values are
    read through their one door: to judge a trained supernet is no search. Errors: UserError for an unknown metric, for
    one that is no accuracy, and where an architecture has none.
    """
    known = [m for m in table.metrics if m.startswith(("test_", "val_")) and m.endswith(MAXIMIZED_ENDINGS)]
    name = metric or reference_metric(table)
    if parse_column(name).metric not in known:
        raise UserError(name, f"an accuracy in {table.id} ({one_of(known)})", nearest(name, known))
    if name.startswith("test_"):
        values = table.test_values(None, name, purpose="ranking of a supernet")[rows]
    else:
        values = table.column(name)[rows]
    if not np.isfinite(values).all():
        raise UserError(name, f"a metric of {table.id} that every architecture has")
    return np.asarray(values, float), name


def score(
    trained: TrainedSupernet, archs: Sequence[str], images: int | None = None, progress: Progress | None = None
) -> np.ndarray:
    """[N] accuracies in percent; every one is kept in `ranking/seed-<k>.jsonl` of the run and not computed again.

    The file begins with what the scores depend on; where that is other than now it starts anew. Errors: UserError
    where another process is scoring, RunError when the disk fills.
    """
    val = trained.data.val
    count = min(len(val), images or len(val))
    few = replace(trained, data=replace(trained.data, val=Split(val.images[:count], val.labels[:count])))
    settings = {"step": trained.step, "recalibration": list(RECALIBRATION), "images": count}
    path = trained.run.path / "ranking" / f"seed-{trained.seed}.jsonl"
    with _held(path.with_suffix(".lock")):
        known = _kept(path, settings)
        for done, text in enumerate(archs, 1):
            if text not in known:
                found = few.accuracy(trained.space.decode(text))
                known[text] = found["acc"]
                _append(path, {"arch": text, "acc": found["acc"], "loss": found["loss"]})
            if progress is not None:
                progress(done, len(archs))
    return np.array([known[text] for text in archs])


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, float]:
    """{architecture: accuracy} of a file of scores with these settings; any other file is replaced by an empty one."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line that a killed process left half written
            lines.append(json.loads(text))
    sound = bool(lines) and lines[0] == settings
    with atomic_write(path) as file:
        file.writelines(json.dumps(line) + "\n" for line in (lines if sound else [settings]))
    return {line["arch"]: line["acc"] for line in lines[1:]} if sound else {}


def _append(path: Path, line: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror}; the scores before are kept") from error


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """The lock of a file of scores. Errors: UserError if another process has it or it cannot be written."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait=False))
        except BlockingIOError:
            raise UserError(str(path.parent), "a run that no other process is ranking with") from None
        except OSError as error:
            raise UserError(str(path.parent), f"a folder that can be written ({error.strerror})") from None
        yield


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)
