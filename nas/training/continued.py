"""Whether a run in a folder is the one that is to go on there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nas.run import Run
from search_spaces.common.errors import UserError


def check_continues(
    run: Run,
    kind: str,
    what: str,
    differences: Callable[[Mapping[str, Any]], list[str]],
    data: str,
    about: Mapping[str, Any],
    seeds: Sequence[int],
) -> None:
    """Take more seeds into `run` if it is a `kind` with the same settings, data and first seeds.

    what: `training`, `search`, for messages. differences: from the run's settings, as `name: ours instead of theirs`.
    data: their name; about: their `Dataset.describe()`. Errors: UserError that lists what differs.
    """
    if run.settings.get("kind") != kind:
        raise UserError(str(run.path), f"a new folder or one of a {kind}; this run is a {run.settings.get('kind')}")
    found = differences(run.settings)
    if found:
        raise UserError(str(run.path), f"the settings of the {what} there, or a new folder; {'; '.join(found)}")
    if run.settings["data"] != about:
        changed = [f"{k}: {about.get(k)} instead of {v}" for k, v in run.settings["data"].items() if about.get(k) != v]
        raise UserError(data, f"the data the {what} in {run.path} began with; {'; '.join(changed)}")
    before = run.settings["seeds"]
    if before != list(seeds):
        if before != list(seeds)[: len(before)]:
            raise UserError(list(seeds), f"the seeds of the {what} there, {before}, or more after them")
        run.update_settings(seeds=list(seeds))
