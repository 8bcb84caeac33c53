"""Objectives: which metric, in which direction, under which bound; and what follows for sets of points."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search_spaces.common.errors import UserError
from search_spaces.common.names import nearest

# Directions of known names, by their ending; everything else is written `name:max` or `name:min`.
MAXIMIZED_ENDINGS = ("_acc", "_rocauc")
MINIMIZED_ENDINGS = ("_ms", "_seconds", "_bytes", "_mj", "_loss", "_error", "params", "macs")
_EPOCHS_AND_SEED = re.compile(r"(_\d+)?(_seed\d+)?$")


@dataclass(frozen=True)
class Objective:
    """A metric to maximise or minimise; with a `bound` a constraint that is not optimised.

    A maximised metric is bounded from below, a minimised one from above.
    """

    name: str
    maximize: bool
    bound: float | None = None

    def __str__(self) -> str:
        if self.bound is not None:
            return f"{self.name}{'>=' if self.maximize else '<='}{_shortest(self.bound)}"
        return (
            self.name if _direction(self.name) is self.maximize else f"{self.name}:{'max' if self.maximize else 'min'}"
        )


def _shortest(number: float) -> str:
    """The shortest text that reads back as the same float: 1000000 rather than 1e+06."""
    return f"{number:.15g}" if float(f"{number:.15g}") == number else repr(number)


def _direction(name: str) -> bool | None:
    stem = _EPOCHS_AND_SEED.sub("", name)
    if stem.endswith(MAXIMIZED_ENDINGS):
        return True
    return False if stem.endswith(MINIMIZED_ENDINGS) else None


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """`val_acc,latency_ms,params<=1e6,my_score:max` -> objectives, the first one the primary.

    Errors: UserError for an unknown direction, a bound that is no number, a repeated name, no primary.
    """
    objectives = tuple(_parse_one(part.strip()) for part in text.split(",") if part.strip())
    if not objectives or objectives[0].bound is not None:
        raise UserError(text, "objectives that begin with the one to optimise, such as 'val_acc,params<=1e6'")
    names = [o.name for o in objectives if o.bound is None]
    for name in names:
        if names.count(name) > 1:
            raise UserError(name, "every objective named once")
    return objectives


def _parse_one(text: str) -> Objective:
    bounded = re.fullmatch(r"([^<>=:]+)(<=|>=)(.+)", text)
    if bounded:
        name, sign, number = (part.strip() for part in bounded.groups())
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise UserError(text, f"a finite number after {sign}")
        return Objective(name.replace("-", "_"), sign == ">=", bound)
    name, colon, direction = text.partition(":")
    name, direction = name.strip().replace("-", "_"), direction.strip()
    if colon:
        if direction not in ("max", "min"):
            raise UserError(text, f"{name}:max or {name}:min", f"{name}:{nearest(direction, ['max', 'min']) or 'max'}")
        return Objective(name, direction == "max")
    known = _direction(name)
    if known is None or not re.fullmatch(r"\w+", name):
        raise UserError(text, f"a metric of known direction, or {name}:max, {name}:min, {name}<=NUMBER, {name}>=NUMBER")
    return Objective(name, known)


def optimised(objectives: Sequence[Objective]) -> list[Objective]:
    """The objectives without a bound."""
    return [o for o in objectives if o.bound is None]


def losses(objectives: Sequence[Objective], metrics: Mapping[str, float]) -> tuple[float, ...]:
    """The optimised metrics with signs such that less is better."""
    return tuple(-metrics[o.name] if o.maximize else metrics[o.name] for o in objectives if o.bound is None)


def violation(objectives: Sequence[Objective], metrics: Mapping[str, float]) -> float:
    """The sum of relative excesses over the bounds; 0 when all are kept."""
    total = 0.0
    for o in objectives:
        if o.bound is not None:
            excess = o.bound - metrics[o.name] if o.maximize else metrics[o.name] - o.bound
            total += max(0.0, excess) / (abs(o.bound) or 1.0)
    return total


def primary_score(objectives: Sequence[Objective], metrics: Mapping[str, float] | None) -> tuple[float, float]:
    """(-violation, primary metric oriented so that more is better); a failed trial is below everything.

    Tuples compare as the order of constrained search: fewer violations first, then the metric (Deb 2000).
    """
    if metrics is None:
        return (-math.inf, -math.inf)
    first = objectives[0]
    value = metrics[first.name]
    return (-violation(objectives, metrics), value if first.maximize else -value)


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Indices of the non-dominated rows of `points` [N, m], less is better; equal rows count once (the first).

    Sorted by the first column. O(N log N) for two objectives.
    """
    points = np.asarray(points, float)
    if len(points) == 0:
        return np.empty(0, np.int64)
    _, first = np.unique(points, axis=0, return_index=True)
    order = first[np.lexsort(points[first].T[::-1])]
    if points.shape[1] == 1:
        return order[:1]
    if points.shape[1] == 2:
        second = points[order, 1]
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], second[:-1])))
        return order[second < best_before]
    front: list[int] = []
    for i in order:  # lexicographic order: a point can only be dominated by an earlier one
        if not front or not (points[front] <= points[i]).all(axis=1).any():
            front.append(int(i))
    return np.asarray(front, np.int64)


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """The volume that `points` [N, m] dominate up to `reference` [m], less is better; exact, by slicing."""
    reference = np.asarray(reference, float)
    points = np.asarray(points, float).reshape(-1, len(reference))
    points = points[(points < reference).all(axis=1)]
    if len(points) == 0:
        return 0.0
    points = points[non_dominated(points)]
    if points.shape[1] == 1:
        return float(reference[0] - points[:, 0].min())
    if points.shape[1] == 2:
        heights = np.concatenate(([reference[1]], points[:-1, 1])) - points[:, 1]
        return float(((reference[0] - points[:, 0]) * heights).sum())
    points = points[np.argsort(points[:, -1])]
    depths = np.diff(np.append(points[:, -1], reference[-1]))
    slices = (hypervolume(points[: i + 1, :-1], reference[:-1]) for i in range(len(points)))
    return float(sum(volume * depth for volume, depth in zip(slices, depths, strict=True)))


def scaled_hypervolume(points: np.ndarray, exact_front: np.ndarray, margin: float = 1.1) -> float:
    """Hypervolume with objectives scaled by ideal and nadir of `exact_front`, reference point `margin`.

    points, exact_front: [N, m], [F, m], less is better. A constant objective is scaled by 1.
    """
    exact_front = np.asarray(exact_front, float)
    ideal, nadir = exact_front.min(axis=0), exact_front.max(axis=0)
    width = np.where(nadir > ideal, nadir - ideal, 1.0)
    scaled = (np.asarray(points, float).reshape(-1, exact_front.shape[1]) - ideal) / width
    return hypervolume(scaled, np.full(exact_front.shape[1], margin))
