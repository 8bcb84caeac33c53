"""A user's own space and evaluators, as small as they can be; also imported by worker processes."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass

import numpy as np

from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph
from search_spaces.space import TupleSpace


class Digits(TupleSpace):
    """Three digits below five."""

    name = "digits-space"
    vocabulary = ("input", "output", "0", "1", "2", "3", "4")
    sizes = (5, 5, 5)

    def encode(self, arch):
        return "".join(map(str, arch))

    def decode(self, text):
        if len(text) != 3 or any(c not in "01234" for c in text):
            raise UserError(text, "three digits below five")
        return tuple(map(int, text))

    def graph(self, arch):
        return OpGraph(("input", *map(str, arch), "output"), np.eye(5, k=1))


def score(arch, fidelity=None, seed=0):
    """The sum of the digits, and a cost."""
    return {"val_acc": float(sum(arch)), "params": float(arch[0]), "cost_seconds": 2.0}


def slow_score(arch, fidelity, seed):
    """`score` after ten milliseconds; the seed is seen in the metric."""
    time.sleep(0.01)
    return {"val_acc": sum(arch) + (seed % 1000) / 1e4}


def logged_score(arch, fidelity, seed):
    """`score` that leaves a line in the file named by the environment."""
    with open(os.environ["NASFORGE_TEST_LOG"], "a") as file:
        file.write(json.dumps([list(arch), seed]) + "\n")
    time.sleep(0.005)
    return score(arch)


@dataclass(frozen=True)
class Faulty:
    """Misbehaves for architectures that begin with a given digit."""

    how: str

    def evaluate(self, arch, fidelity=None, *, seed):
        if arch[0] == 0:
            if self.how == "raise":
                raise RuntimeError("no such luck")
            if self.how == "hang":
                time.sleep(60)
            if self.how == "die":
                os._exit(3)
            if self.how == "nan":
                return {"val_acc": math.nan}
            if self.how == "text":
                return {"val_acc": "high"}
            if self.how == "nothing":
                return None
            if self.how == "other":
                return {"accuracy": 1.0}
        return score(arch)


class Unpicklable:
    """Cannot travel to a worker."""

    def __init__(self):
        self.handle = lambda: None

    def evaluate(self, arch, fidelity=None, *, seed):
        return score(arch)
