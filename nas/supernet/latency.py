"""How long each candidate takes where it stands, and the latency that the alphas expect of a network.

Cai et al., ProxylessNAS, ICLR 2019, section 4.2; mit-han-lab/proxylessnas bf58b5c, search/nas_manager.py.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nas.supernet.evolution import selected
from nas.supernet.mixed import Mixed
from nas.supernet.network import Draw, Supernet
from nas.supernet.part import Part
from nas.supernet.relaxation import Weights
from nas.supernet.settings import Latency
from nas.training.preflight import wait
from nas.training.recalibrate import evaluating
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write

if TYPE_CHECKING:
    from nas.supernet.recipe import Recipe
    from nas.supernet.state import SearchState

FORMAT = 1
FILE = "latency.json"  # in the folder of a run
WARM_UP = 3  # passes that are not timed
SHORTEST_MS = 0.001  # of a network: the logarithm of microseconds is above 0


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds. labels: {label: [candidates]}, sums over the places of a label; rest_ms: outside all choices.

    device: what it was measured on; input: shape of the images. Errors: UserError for times below 0 or no numbers.
    """

    labels: Mapping[str, Sequence[float]]
    rest_ms: float
    device: str = "cpu"
    input: Sequence[int] = ()

    def __post_init__(self) -> None:
        for value in (self.rest_ms, *(v for values in self.labels.values() for v in values)):
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise UserError(value, "a time in milliseconds, at least 0")

    def as_json(self) -> dict[str, Any]:
        """Plain values; `table_of` inverts it."""
        labels = {label: list(values) for label, values in self.labels.items()}
        about = {"format": FORMAT, "device": self.device, "input": list(self.input)}
        return {**about, "rest_ms": self.rest_ms, "labels": labels}


def table_of(found: Mapping[str, Any]) -> LatencyTable:
    """The table that `LatencyTable.as_json` wrote. Errors: UserError for a newer format or something else."""
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        raise UserError(str(found)[:60], f"a table of latencies in format {FORMAT}")
    labels = found.get("labels")
    if (
        not isinstance(labels, Mapping)
        or not all(isinstance(v, list) for v in labels.values())
        or "rest_ms" not in found
    ):
        raise UserError(sorted(found), "a table of latencies with labels, a list for each, and rest_ms")
    return LatencyTable(labels, found["rest_ms"], found.get("device", ""), found.get("input", ()))


def read_table(path: str | Path) -> LatencyTable:
    """The table in a JSON file. Errors: UserError for a file that is not there or none."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        raise UserError(str(path), "a JSON file with a table of latencies") from None
    return table_of(found)


def measure(supernet: Supernet, shape: Sequence[int], *, repeats: int = 20) -> LatencyTable:
    """Time every candidate of every place in evaluation mode, alone and on an input of the shape it has there.

    shape: [N, C, H, W] of the images. repeats: passes, of which the median counts. Places of a label with inputs of the
    same shape are timed once. The supernet is as before afterwards. Errors: UserError for choices within choices.
    """
    device = next(supernet.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def random(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(device)

    median = functools.partial(_median_ms, device=device, repeats=repeats)
    images, labels, first = random(shape), {}, dict.fromkeys(supernet.labels, 0)
    with torch.no_grad(), evaluating(supernet):
        inputs = _inputs_of(supernet, images)
        for label, places in supernet._mixed.items():
            known: dict[tuple, list[float]] = {}
            for place in places:
                assert isinstance(place, Mixed)
                if any(isinstance(m, Mixed) for candidate in place.candidates for m in candidate.modules()):
                    raise UserError(label, "no choice within another, where latency is measured")
                shapes = inputs[id(place)]
                if shapes not in known:
                    given = [random(one) for one in shapes]
                    known[shapes] = [median(functools.partial(place._around, c, *given)) for c in place.candidates]
            measured = [known[inputs[id(place)]] for place in places]
            labels[label] = [sum(column) for column in zip(*measured)]
        with selected(supernet, first):
            whole = median(lambda: supernet(images))
    rest = max(0.0, whole - sum(values[0] for values in labels.values()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return LatencyTable(labels, rest, name, tuple(shape))


def expected_latency(table: LatencyTable, alphas: Mapping[str, Tensor]) -> Tensor:
    """Milliseconds: every candidate's time weighed by softmax(alpha), and the rest. A scalar with gradient.

    Errors: UserError for a table of other labels or numbers of candidates.
    """
    ours = {label: len(alpha) for label, alpha in alphas.items()}
    theirs = {label: len(values) for label, values in table.labels.items()}
    if ours != theirs:
        differ = next(label for label in (*ours, *theirs) if ours.get(label) != theirs.get(label))
        counts = f"{ours.get(differ, 0)} candidates for this label; it has {theirs.get(differ, 0)}"
        raise UserError(differ, f"a table of latencies with {counts}")
    terms = [(a.softmax(0) * torch.tensor(table.labels[label]).to(a)).sum() for label, a in alphas.items()]
    return torch.stack(terms).sum() + table.rest_ms


def with_latency(loss: Tensor, latency_ms: Tensor, reference_ms: float, settings: Latency) -> Tensor:
    """The loss with the latency in it, in the form that `settings` names.

    The logarithms are of microseconds, so that they are positive for small networks too; the authors' are of
    milliseconds on a phone, whose reference is 80.
    """
    if settings.form == "add-linear":
        return loss + settings.weight * (latency_ms - reference_ms) / reference_ms
    ratio = (1000 * latency_ms).log() / math.log(1000 * reference_ms)
    return settings.alpha * loss * ratio**settings.beta


class LatencyLoss(Part):
    """Puts the expected latency into the alphas' loss; its table is measured once and then kept with the search."""

    def __init__(self, supernet: Supernet, settings: Latency):
        self.supernet, self.settings = supernet, settings
        self.table: LatencyTable | None = None
        self.reference_ms = math.nan

    def prepare(self, state: SearchState, recipe: Recipe, folder: Path) -> None:
        self._find(state, folder / FILE)

    def begin_epoch(self, state: SearchState, recipe: Recipe) -> None:
        if self.table is None:
            self._find(state, None)

    def _find(self, state: SearchState, kept: Path | None) -> None:
        """The leading process takes the table in `kept`, in the file that is set, or a new one, which is kept."""
        if not state.processes.leads:
            self._use(table_of(state.processes.first(None)))
            return
        known = kept is not None and kept.exists()
        if known or self.settings.file is not None:
            self._use(read_table(kept if known else self.settings.file))  # type: ignore[arg-type]
        else:
            shape = (self.settings.images, *state.batches.images.shape[1:])
            self._use(measure(self.supernet, shape, repeats=self.settings.repeats))
        assert self.table is not None
        state.processes.first(self.table.as_json())
        if kept is not None and not known:
            with atomic_write(kept) as file:
                json.dump(self.table.as_json(), file, indent=1)

    def _use(self, table: LatencyTable) -> None:
        uniform = {label: torch.zeros(len(alpha)) for label, alpha in self.supernet.alphas.items()}
        reference = float(expected_latency(table, uniform))
        reference = reference if self.settings.reference_ms is None else self.settings.reference_ms
        shortest = table.rest_ms + sum(min(values) for values in table.labels.values())
        if self.settings.form == "mul-log" and not min(shortest, reference) > SHORTEST_MS:
            raise UserError(shortest, f"latencies of all networks above {SHORTEST_MS} ms with the form mul-log")
        if not reference > 0:
            raise UserError(reference, "a reference latency above 0")
        self.table, self.reference_ms = table, reference

    def alphas_loss(self, loss: Tensor) -> Tensor:
        assert self.table is not None
        latency = expected_latency(self.table, self.supernet.alphas)
        return with_latency(loss, latency, self.reference_ms, self.settings)

    def row(self) -> dict[str, Any]:
        if self.table is None:
            return {}
        with torch.no_grad():
            return {"expected_latency_ms": float(expected_latency(self.table, self.supernet.alphas))}

    def state_dict(self) -> dict[str, Any]:
        return {"table": None if self.table is None else self.table.as_json()}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        if content["table"] is None:
            self.table = None
        else:
            self._use(table_of(content["table"]))


def _inputs_of(supernet: Supernet, images: Tensor) -> dict[int, tuple[torch.Size, ...]]:
    """{id of a place: the shapes of its inputs}; all candidates run, so that every place is passed."""
    found: dict[int, tuple[torch.Size, ...]] = {}

    def remember(place: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[id(place)] = tuple(x.shape for x in inputs)

    hooks = [p.register_forward_pre_hook(remember) for places in supernet._mixed.values() for p in places]
    everything = {
        label: Weights(a.detach().softmax(0)) for label, a in supernet.alphas.items() if label not in supernet.fixed
    }
    try:
        supernet(images, draw=Draw(everything, {}))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _median_ms(call: Callable[[], Any], *, device: torch.device, repeats: int) -> float:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(repeats):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)
