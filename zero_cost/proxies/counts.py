"""Proxies that read shapes and weights only: the baselines beside which every other one is reported."""

from __future__ import annotations

import math

import torch

from zero_cost.captured import Captured
from zero_cost.definition import proxy
from zero_cost.errors import NoValue

COUNT = "a count"


@proxy("params", needs=("params",), formula="number of trainable scalars", source=COUNT)
def params(captured: Captured) -> float:
    return captured.params


@proxy("macs", needs=("static",), formula="multiply-adds of convolutions and linear layers, one sample", source=COUNT)
def macs(captured: Captured) -> float:
    return captured.static.macs


@proxy("live-macs", needs=("static",), formula="macs of layers on a path from input to output", source=COUNT)
def live_macs(captured: Captured) -> float:
    return captured.static.live_macs


@proxy("depth", needs=("static",), formula="weighted layers on the longest path from input to output", source=COUNT)
def depth(captured: Captured) -> float:
    return captured.static.depth


@proxy("paths", needs=("static",), formula="log of the number of paths from input to output", source=COUNT)
def paths(captured: Captured) -> float:
    if not captured.static.paths:
        raise NoValue("the output does not depend on the input")
    return math.log(captured.static.paths)  # whole numbers of any size


@proxy("l2-norm", needs=("weights",), formula="sum_l ||W_l||_2", source="Abdelfattah et al., ICLR 2021, released code")
def l2_norm(captured: Captured) -> torch.Tensor:
    if not captured.weights:
        raise NoValue("the model has no weights of convolutions or linear layers")
    return torch.stack([torch.linalg.vector_norm(w) for w in captured.weights.values()]).double().sum()
