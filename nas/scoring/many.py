"""score_architectures: any proxies of many architectures, with workers, a cache and several seeds."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from nas.scoring.cache import ScoreCache
from nas.scoring.task import (
    COUNTED,
    ScoringTask,
    find_proxy,
    follows_function,
    follows_live_calls,
    nothing_dead,
    proxy_names,
    representative,
)
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import match, nearest
from search_spaces.registry import load_space

logger = logging.getLogger("nasforge.scoring")
WEIGHTS = ("own", "shared")
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of architectures, higher is better; NaN where there is no value.

    archs: [N] in the space's notation. proxies: [P]. seeds: [K]. values: [N, P, K]. reasons: (architecture, proxy) ->
    why a value is missing (of the first seed without one). networks: how many networks were scored for it now.
    notes: what was done otherwise than asked for.
    """

    archs: tuple[str, ...]
    proxies: tuple[str, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)
    networks: int = 0
    notes: tuple[str, ...] = ()

    def column(self, proxy: str) -> np.ndarray:
        """[N, K] values of one proxy. Errors: UserError."""
        if proxy not in self.proxies:
            raise UserError(proxy, f"a proxy of this table ({one_of(self.proxies)})", nearest(proxy, self.proxies))
        return self.values[:, self.proxies.index(proxy)]

    def mean(self) -> np.ndarray:
        """[N, P] means over the seeds; NaN where one is missing."""
        return self.values.mean(2)

    def spread(self) -> np.ndarray:
        """[N, P] standard deviations over the seeds (of the sample); NaN for one seed."""
        if len(self.seeds) < 2:
            return np.full(self.values.shape[:2], np.nan)
        return self.values.std(2, ddof=1)


@dataclass(frozen=True)
class _Job:
    archs: tuple[str, ...]
    seed: int
    proxies: tuple[str, ...]
    shared: bool = False


def score_architectures(
    task: ScoringTask,
    archs: Sequence[Any],
    proxies: str | Sequence[str] = "all",
    *,
    seeds: Sequence[int] = (0,),
    by_class: bool = True,
    weights: str = "own",
    workers: int = 1,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """Score every architecture with every proxy at every seed.

    proxies: names (`all` for every one), or `package.module:object` of a Proxy of one's own. by_class: architectures
    that compute the same function of their weights (`function_key`) share the value of one of them, for the proxies
    that see nothing of dead branches, and where no dead branch has weights also for those that count ReLU or BatchNorm
    calls. weights: `own`, a network is initialised for every architecture; or `shared`, one network of all choices
    (`space.choices`) is, and forward-only proxies are read off it for many architectures at once (see
    `nas.scoring.batched`); the other proxies see the same weights one by one, and spaces without such a network are
    scored with weights of their own (said in `notes`). workers: processes. cache: a file (see `default_cache`); what
    it holds is not computed, so a call that was interrupted goes on where it stopped. `params`, `macs` and `live-macs`
    come from the space. Errors: UserError for unknown proxies or data.
    """
    weights = match(weights, WEIGHTS, "a kind of weights")
    names = proxy_names(proxies)
    chosen = {name: find_proxy(name) for name in names}
    shared = {name for name, proxy in chosen.items() if by_class and follows_function(proxy)}
    space = load_space(task.space)
    texts = [space.encode(arch) for arch in archs]
    counts = [task.counts(arch) for arch in archs] if set(names) & set(COUNTED) else [{} for _ in archs]
    by_calls = {name for name, proxy in chosen.items() if by_class and follows_live_calls(proxy)} - shared
    first = [representative(space, task.space, a) if shared or by_calls else a for a in archs]
    standing = [space.encode(a) for a in first]
    alive = [bool(by_calls) and nothing_dead(space, a, f) for a, f in zip(archs, first, strict=True)]

    def place(k: int, name: str) -> str:
        return standing[k] if name in shared or (name in by_calls and alive[k]) else texts[k]

    notes: list[str] = []
    if weights == "shared" and not _has_choices(task.space):
        notes.append(f"{task.space} has no network of choices: every architecture has weights of its own")
        weights = "own"
    digest = task.digest() if weights == "own" else f"{task.digest()}-shared-{_shared_code()}"
    store = ScoreCache(cache, digest, list({*texts, *standing}))
    wanted: dict[tuple[str, int], dict[str, None]] = {}
    for k in range(len(archs)):
        for name in names:
            for seed in seeds:
                if name not in counts[k] and (place(k, name), seed, name) not in store:
                    wanted.setdefault((place(k, name), seed), {})[name] = None
    total, done = len(wanted), 0
    jobs = _jobs(task, wanted, weights == "shared", workers)
    if progress is not None:
        progress(0, total)
    for job, found, note in _run_all(task, jobs, workers):
        for arch, (values, reasons) in zip(job.archs, found, strict=True):
            store.add(arch, job.seed, values, reasons)
        done += len(found)
        if note and note not in notes:
            notes.append(note)
        if progress is not None:
            progress(done, total)
    for note in notes:
        logger.warning(note)

    values_found = np.full((len(archs), len(names), len(seeds)), np.nan)
    why: dict[tuple[str, str], str] = {}
    for k in range(len(archs)):
        for p, name in enumerate(names):
            if name in counts[k]:
                values_found[k, p] = counts[k][name]
                continue
            for s, seed in enumerate(seeds):
                values_found[k, p, s], reason = store[place(k, name), seed, name]
                if reason:
                    why.setdefault((texts[k], name), reason)
    return ScoreTable(tuple(texts), tuple(names), tuple(seeds), values_found, why, total, tuple(notes))


Found = list[tuple[dict[str, float], dict[str, str]]]  # values and reasons of each architecture of a job
Done = tuple[_Job, Found, str]


def _jobs(
    task: ScoringTask, wanted: Mapping[tuple[str, int], Mapping[str, None]], shared: bool, workers: int
) -> list[_Job]:
    """One job for each network; with shared weights one for many that miss the same at the same seed."""
    if not shared:
        return [_Job((arch,), seed, tuple(missing)) for (arch, seed), missing in wanted.items()]
    from nas.scoring.batched import block_size

    alike: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for (arch, seed), missing in wanted.items():
        alike.setdefault((seed, tuple(missing)), []).append(arch)
    jobs = []
    for (seed, names), archs in alike.items():
        size = min(block_size(task), -(-len(archs) // max(workers, 1)))
        jobs += [_Job(tuple(archs[k : k + size]), seed, names, True) for k in range(0, len(archs), size)]
    return jobs


def _run_all(task: ScoringTask, jobs: Sequence[_Job], workers: int) -> Iterator[Done]:
    """Finished jobs, in whatever order they finish."""
    if workers < 1:
        raise UserError(workers, "a number of workers from 1")
    if workers == 1 or len(jobs) < 2:
        yield from (_score(task, job) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn")) as pool:
        futures = [pool.submit(_score, task, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _score(task: ScoringTask, job: _Job) -> Done:
    space = load_space(task.space)
    archs = [space.decode(text) for text in job.archs]
    if not job.shared:
        return job, [task.score(arch, job.seed, job.proxies) for arch in archs], ""
    from nas.scoring.batched import SharedNetwork
    from nas.scoring.program import NotTogether

    shared = SharedNetwork(task, job.seed)
    try:
        return job, shared.score(archs, job.proxies), ""
    except NotTogether as reason:
        note = f"shared weights, but one architecture at a time: {reason}"
        return job, [shared.one_by_one(arch, job.proxies) for arch in archs], note


def _has_choices(space: str) -> bool:
    from nas.scoring.batched import has_choices

    return has_choices(load_space(space))


@functools.cache
def _shared_code() -> str:
    """A hash of the code that scores many architectures at once."""
    content = hashlib.sha256()
    for name in ("batched.py", "program.py"):
        content.update((Path(__file__).parent / name).read_bytes())
    return content.hexdigest()[:8]
