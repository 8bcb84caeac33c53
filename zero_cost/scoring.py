"""`score`: any set of proxies of one model from one probe."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from zero_cost.captured import Captured, Loss, Probe
from zero_cost.definition import NEEDS_LABELS, Proxy
from zero_cost.errors import NoValue, UserError, nearest
from zero_cost.network import Network, Output, first_tensor, random_state, reproducible, training
from zero_cost.passes.curve import curve_pass
from zero_cost.passes.per_sample import ntk_pass, sign_sums_pass
from zero_cost.passes.redrawn import stages_pass, zen_pass
from zero_cost.passes.sequences import sequences_pass
from zero_cost.passes.synflow import synflow_pass
from zero_cost.probe import shared_pass, static_pass
from zero_cost.proxies import PROXIES

PASSES = (
    static_pass,
    shared_pass,
    synflow_pass,
    sign_sums_pass,
    ntk_pass,
    zen_pass,
    stages_pass,
    curve_pass,
    sequences_pass,
)
Batch = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Scores(Mapping[str, float]):
    """{proxy: value}, higher is better. A proxy without a finite value has NaN (rank it worst) and a reason.

    seconds: per step of the passes, and of all proxies together.
    """

    values_by_name: dict[str, float]
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


def score(
    model: nn.Module,
    batch: Any,
    proxies: str | Proxy | Iterable[str | Proxy] = "all",
    *,
    loss: Loss | None = None,
    output: Output = first_tensor,
    seed: int = 0,
    device: torch.device | str | None = None,
    batches: int = 2,
    few: int = 16,
    repeats: int = 1,
    stages: Sequence[str] | None = None,
    regularisation: tuple[float, float] | None = None,
) -> Scores:
    """Training-free scores of a model at its present weights; the model comes back untouched.

    batch: inputs [B, ...], (inputs, labels), or a list or DataLoader of such pairs, of which the first `batches` are
    read (only `zico` reads more than one). proxies: names, Proxy objects of your own, or "all".
    loss: (logits, labels) -> mean loss (default: cross-entropy). output: what the model returns -> logits (default:
    `first_tensor`). seed: of dropout and of random inputs and weights. device: where to compute (default: where the
    model is). few: samples that the per-sample and pattern-counting proxies read. repeats: draws of random weights
    (`zen`). stages: names of the modules whose outputs AZ-NAS compares (default: `model.stages()`).
    regularisation: (mu, sigma) of `reg-swap`.

    BatchNorm runs on batch statistics. Whatever the model does wrong becomes a reason. Errors: UserError for an unknown
    proxy, an empty batch, or labels that name no class.
    """
    chosen = choose(proxies)
    network = Network(model, device, seed, output)
    with random_state(network.device, seed):  # which a shuffled DataLoader draws from
        read = _batches(batch, batches)
    data = [(x.to(network.device), None if y is None else y.to(network.device)) for x, y in read]
    samples = len(data[0][0])
    reasons = {p.name: refusal(p, samples, data[0][1]) for p in chosen}
    usable = [p for p in chosen if not reasons[p.name]]
    if stages is None:
        named: Any = getattr(model, "stages", None)
        stages = named() if callable(named) else ()
    wanted = frozenset(need for p in usable for need in p.needs)
    probe = Probe(network, data, wanted, loss, few, repeats, tuple(stages))
    probe.captured.inputs, probe.captured.labels, probe.captured.samples = data[0][0], data[0][1], samples
    probe.captured.regularisation = regularisation
    with training(model), reproducible(), torch.enable_grad():
        for run in PASSES:
            run(probe)
    begin = time.perf_counter()
    values = dict.fromkeys(reasons, math.nan)
    for found in usable:
        values[found.name], reasons[found.name] = value_of(found, probe.captured, probe.failed)
    probe.seconds["proxies"] = time.perf_counter() - begin
    return Scores(values, {name: reason for name, reason in reasons.items() if reason}, probe.seconds)


def choose(proxies: str | Proxy | Iterable[str | Proxy]) -> list[Proxy]:
    """The proxies by name (underscores accepted, "all" for every one); UserError names one that there is not."""
    if proxies == "all":
        return list(PROXIES.values())
    chosen = []
    for item in [proxies] if isinstance(proxies, str | Proxy) else proxies:
        if isinstance(item, Proxy):
            chosen.append(item)
        elif (name := str(item).replace("_", "-")) in PROXIES:
            chosen.append(PROXIES[name])
        else:
            raise UserError(item, f"one of {', '.join(PROXIES)}", nearest(name, PROXIES))
    return chosen


def refusal(proxy: Proxy, samples: int, labels: torch.Tensor | None) -> str:
    """Why a proxy cannot be had from such a batch; empty if it can."""
    if labels is None and (proxy.reads_labels or not NEEDS_LABELS.isdisjoint(proxy.needs)):
        return "needs labels"
    return f"needs at least {proxy.min_samples} samples, got {samples}" if samples < proxy.min_samples else ""


def value_of(proxy: Proxy, captured: Captured, failed: Mapping[str, str]) -> tuple[float, str]:
    """(value, "") or (NaN, reason). failed: {field of captured: why it is missing}."""
    for need in proxy.needs:
        if need in failed:
            return math.nan, failed[need]
    try:
        value = float(proxy.compute(captured))  # type: ignore[arg-type]
    except NoValue as reason:
        return math.nan, str(reason)
    except torch.linalg.LinAlgError as error:  # what was captured is not finite
        return math.nan, f"not finite: {error}"
    return (value, "") if math.isfinite(value) else (math.nan, f"not finite: {value}")


def _batches(batch: Any, count: int) -> list[Batch]:
    """The first `count` (inputs, labels) pairs of what `score` accepts; fewer if there are fewer."""
    if isinstance(batch, torch.Tensor):
        batch = [(batch, None)]
    elif isinstance(batch, tuple | list) and batch and isinstance(batch[0], torch.Tensor):
        batch = [batch]
    if not isinstance(batch, Iterable):
        raise UserError(type(batch).__name__, "inputs, (inputs, labels), or a list or DataLoader of such pairs")
    found: list[Batch] = []
    for item in islice(batch, max(count, 1)):
        inputs, labels = (item, None) if isinstance(item, torch.Tensor) else (*item, None)[:2]
        if not isinstance(inputs, torch.Tensor) or not (labels is None or isinstance(labels, torch.Tensor)):
            raise UserError(type(inputs).__name__, "a batch of tensors: inputs, or (inputs, labels)")
        if inputs.dim() == 0 or len(inputs) == 0:
            raise UserError(list(inputs.shape), "at least one sample in a batch")
        if labels is not None and labels.dim() and len(labels) != len(inputs):
            raise UserError(len(labels), f"as many labels as samples ({len(inputs)})")
        found.append((inputs, labels))
    if not found:
        raise UserError(0, "at least one batch")
    return found
