"""score_architectures: any proxies of many architectures, with workers, a cache and several seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from nas.scoring.cache import ScoreCache
from nas.scoring.task import COUNTED, ScoringTask, find_proxy, follows_function, proxy_names, representative
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.registry import load_space

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores of architectures, higher is better; NaN where there is no value.

    archs: [N] in the space's notation. proxies: [P]. seeds: [K]. values: [N, P, K]. reasons: (architecture, proxy) ->
    why a value is missing (of the first seed without one). networks: how many networks were scored for it now.
    """

    archs: tuple[str, ...]
    proxies: tuple[str, ...]
    seeds: tuple[int, ...]
    values: np.ndarray
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)
    networks: int = 0

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
    arch: str
    seed: int
    proxies: tuple[str, ...]


def score_architectures(
    task: ScoringTask,
    archs: Sequence[Any],
    proxies: str | Sequence[str] = "all",
    *,
    seeds: Sequence[int] = (0,),
    by_class: bool = True,
    workers: int = 1,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """Score every architecture with every proxy at every seed.

    proxies: names (`all` for every one), or `package.module:object` of a Proxy of one's own. by_class: architectures
    that compute the same function of their weights (`function_key`) share the value of one of them, for the proxies
    that see nothing of dead branches. workers: processes. cache: a file (see `default_cache`); what it holds is not
    computed, so a call that was interrupted goes on where it stopped. `params`, `macs` and `live-macs` come from the
    space. Errors: UserError for unknown proxies or data.
    """
    names = proxy_names(proxies)
    chosen = {name: find_proxy(name) for name in names}
    shared = {name for name, proxy in chosen.items() if by_class and follows_function(proxy)}
    space = load_space(task.space)
    texts = [space.encode(arch) for arch in archs]
    counts = [task.counts(arch) for arch in archs] if set(names) & set(COUNTED) else [{} for _ in archs]
    standing = [space.encode(representative(space, task.space, a)) for a in archs] if shared else texts

    def place(k: int, name: str) -> str:
        return standing[k] if name in shared else texts[k]

    store = ScoreCache(cache, task.digest(), list({*texts, *standing}))
    wanted: dict[tuple[str, int], dict[str, None]] = {}
    for k in range(len(archs)):
        for name in names:
            for seed in seeds:
                if name not in counts[k] and (place(k, name), seed, name) not in store:
                    wanted.setdefault((place(k, name), seed), {})[name] = None
    jobs = [_Job(arch, seed, tuple(missing)) for (arch, seed), missing in wanted.items()]
    if progress is not None:
        progress(0, len(jobs))
    for done, (job, values, reasons) in enumerate(_run_all(task, jobs, workers), 1):
        store.add(job.arch, job.seed, values, reasons)
        if progress is not None:
            progress(done, len(jobs))

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
    return ScoreTable(tuple(texts), tuple(names), tuple(seeds), values_found, why, len(jobs))


Done = tuple[_Job, dict[str, float], dict[str, str]]


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
    values, reasons = task.score(load_space(task.space).decode(job.arch), job.seed, job.proxies)
    return job, values, reasons
