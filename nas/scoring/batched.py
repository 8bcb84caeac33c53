"""Forward-only proxies of many architectures at once, on one network of all choices.

With `weights="shared"` an architecture has the weights that the network of `space.choices`, initialised from a seed,
gives it. What one forward pass tells is then read off a `Program`; the rest is scored one by one on the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from nas.scoring.program import Ids, Program
from nas.scoring.task import ScoringTask, find_proxy
from search_spaces.choice import Choice
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace
from zero_cost.captured import Captured, Codes, Stages, Zen
from zero_cost.definition import Proxy
from zero_cost.network import Network
from zero_cost.passes.redrawn import MIX, covariance_eigenvalues, redrawn
from zero_cost.probe import common_units
from zero_cost.scoring import refusal, value_of

ADDITIVE = frozenset({"meco", "meco-opt"})  # sums over the feature maps, so that a map is scored once
SPECTRAL = frozenset({"az-expressivity", "az-progressivity"})  # read the eigenvalues of the stages alone
NEEDS = frozenset({"params", "weights", "codes", "live_codes", "logits", "synflow_forward", "zen"})
MEMORY = 1 << 30  # bytes for the values of the architectures that are computed together, on a CPU
MOST = 512  # architectures of one program
Scored = tuple[dict[str, float], dict[str, str]]  # {proxy: value}, {proxy: reason where it is NaN}


def has_choices(space: SearchSpace) -> bool:
    """Whether a space has a network of choices, on which its architectures share weights."""
    return type(space).choices is not SearchSpace.choices and type(space).select is not SearchSpace.select


def together(proxy: Proxy) -> bool:
    """Whether many architectures are scored at once; the others one by one."""
    return NEEDS.issuperset(proxy.needs) or proxy.name in ADDITIVE or proxy.name in SPECTRAL


def block_size(task: ScoringTask) -> int:
    """How many architectures one program holds at most: a table of 2^few patterns is kept for each."""
    return max(1, min(MOST, (1 << 30) >> min(task.few, 24)))


class SharedNetwork:
    """The network of all choices of a task's space with the weights of a seed. Errors: UserError."""

    def __init__(self, task: ScoringTask, seed: int):
        self.task, self.seed = task, seed
        self.space = load_space(task.space)
        data = task.opened()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            found = self.space.choices(in_channels=data.shape[0], num_classes=data.num_classes, **task.network)
        self.network = found.to(task.device).train()
        choices = [(f"{n}.", part) for n, part in self.network.named_modules() if isinstance(part, Choice)]
        self._names: dict[str, tuple[str, list[tuple[str, int]]]] = {}
        for name in self.network.state_dict():
            plain, conditions = name, []
            for prefix, choice in sorted(choices, key=lambda pair: -len(pair[0])):  # inner choices first
                if name.startswith(prefix + "candidates."):
                    index = name[len(prefix) + 11 :].partition(".")[0]
                    conditions.append((choice.label, int(index)))
                    plain = prefix + plain[len(f"{prefix}candidates.{index}.") :]
            self._names[name] = plain, conditions

    def names(self, arch: Any) -> dict[str, str]:
        """{name in this network: name in `space.build(arch)`} of what the architecture uses."""
        picked = self.space.select(arch)
        return {name: plain for name, (plain, where) in self._names.items() if all(picked[c] == k for c, k in where)}

    def model(self, arch: Any) -> nn.Module:
        """The network of one architecture by itself, with its shared weights."""
        state = self.network.state_dict()
        model = self.task.model(arch, self.seed)
        model.load_state_dict({plain: state[name] for name, plain in self.names(arch).items()})
        return model

    def score(self, archs: Sequence[Any], proxies: Iterable[str]) -> list[Scored]:
        """The scores of every architecture; what forward passes tell of all of them at once. Errors: NotTogether."""
        chosen = {name: find_proxy(name) for name in proxies}
        at_once = {name: p for name, p in chosen.items() if together(p)}
        rest = [name for name in chosen if name not in at_once]
        before = torch.get_num_threads()
        torch.set_num_threads(self.task.threads)
        try:
            found = _Population(self, archs).score(at_once) if at_once else [({}, {}) for _ in archs]
        finally:
            torch.set_num_threads(before)
        return [self._joined(chosen, one, arch, rest) for one, arch in zip(found, archs, strict=True)]

    def _joined(self, chosen: Iterable[str], found: Scored, arch: Any, rest: list[str]) -> Scored:
        values, reasons = self.one_by_one(arch, rest) if rest else ({}, {})
        values = {**found[0], **values}
        return {name: values[name] for name in chosen}, {**found[1], **reasons}

    def one_by_one(self, arch: Any, proxies: Iterable[str]) -> Scored:
        """The scores of one architecture on its shared weights."""
        return self.task.score(arch, self.seed, proxies, self.model(arch))


class _Population:
    """The passes over many architectures, and what each of them captures of every one."""

    def __init__(self, shared: SharedNetwork, archs: Sequence[Any]):
        task = shared.task
        self.shared, self.archs, self.task, self.network = shared, archs, task, shared.network
        self.device = torch.device(task.device)
        self.inputs, self.labels = (x.to(self.device) for x in task.batch(shared.seed)[0])
        self.selections = [shared.space.select(arch) for arch in archs]
        self.captured = [Captured() for _ in archs]
        self.additive: dict[str, np.ndarray] = {}

    def score(self, proxies: Mapping[str, Proxy]) -> list[Scored]:
        refused = {name: refusal(p, len(self.inputs), self.labels) for name, p in proxies.items()}
        usable = {name: p for name, p in proxies.items() if not refused[name]}
        wanted = {need for p in usable.values() for need in p.needs}
        self._counts({"params", "weights"} & wanted)
        if wanted & {"codes", "live_codes", "features", "logits"}:
            self._forward(wanted, {n: p for n, p in usable.items() if p.name in ADDITIVE})
        if "synflow_forward" in wanted:
            self._synflow()
        if "zen" in wanted:
            self._zen()
        if "stages" in wanted:
            self._stages()
        found = []
        for k, captured in enumerate(self.captured):
            values, reasons = dict.fromkeys(proxies, math.nan), dict(refused)
            for name, p in usable.items():
                if name in self.additive:
                    value = float(self.additive[name][k])
                    values[name], reasons[name] = value, "" if math.isfinite(value) else f"not finite: {value}"
                else:
                    values[name], reasons[name] = value_of(p, captured, {})
            found.append((values, {name: why for name, why in reasons.items() if why}))
        return found

    def _counts(self, wanted: set[str]) -> None:
        for captured in self.captured:
            captured.labels, captured.samples = self.labels, len(self.inputs)
            captured.regularisation = self.task.regularisation
        if not wanted:
            return
        parameters = {name: p.detach() for name, p in self.network.named_parameters()}
        weights = set(Network(self.network, self.device, self.shared.seed).weights)
        for arch, captured in zip(self.archs, self.captured, strict=True):
            names = [name for name in self.shared.names(arch) if name in parameters]
            captured.params = sum(parameters[name].numel() for name in names)
            captured.weights = {name: parameters[name] for name in names if name in weights}

    def _run(self, program: Program, inputs: torch.Tensor, places: list[Ids], see: Any, **given: Any) -> None:
        """Run a program so that every value at `places` is seen once, as many architectures together as there is
        memory for; alike ones together."""
        inputs = channels_last(inputs)
        bytes_each = 8 * program.largest * len(inputs) * inputs.element_size()  # a cell keeps a handful of values
        on_cpu = self.device.type == "cpu"
        count = max(1, (MEMORY if on_cpu else MEMORY << 4) // bytes_each)
        order = np.lexsort(np.stack(places)[::-1]) if places else np.arange(0)
        seen: set[int] = {-1}
        for begin in range(0, len(order), count):
            wanted = set(np.unique(np.stack(places)[:, order[begin : begin + count]]).tolist()) - seen
            program.run(inputs, wanted, see, elements=1 << (16 if on_cpu else 27), **given)
            seen |= wanted

    def _forward(self, wanted: set[str], additive: Mapping[str, Proxy]) -> None:
        """Codes, feature maps and logits of the first batch."""
        program = Program(self.network, self.selections, self.inputs, separate_relus="live_codes" in wanted)
        handlers: list[tuple[dict[int, Any], Callable[[Any, torch.Tensor], None]]] = []
        places: list[Ids] = []
        codes = maps = None
        if "codes" in wanted:
            codes = _CodeSums(program, len(self.inputs), self.task.few, self.device, "live_codes" in wanted)
            places += [ids for ids, _ in program.relus]
            handlers.append((codes.users, codes.see))
        if additive:
            maps = _MapSums(program, additive)
            places += program.leaves
            handlers.append((maps.users, maps.see))
        if "logits" in wanted:
            places.append(program.output)
        outputs = set(program.output.tolist())
        logits: dict[int, torch.Tensor] = {}

        def see(nodes: list[int], values: torch.Tensor) -> None:
            for node, value in zip(nodes, values, strict=True):
                for users, handle in handlers:
                    if node in users:
                        handle(users[node], value)
                if node in outputs:
                    logits[node] = value

        self._run(program, self.inputs, places, see)
        for k, captured in enumerate(self.captured):
            if codes is not None:
                captured.codes = codes.of(k)
            if "logits" in wanted:
                captured.logits = logits[int(program.output[k])]
        if maps is not None:
            self.additive = maps.totals()

    def _synflow(self) -> None:
        """log R of `zero_cost.passes.synflow`: absolute weights in float64, an input of ones, no normalisation."""
        ones = torch.ones_like(self.inputs[:1], dtype=torch.float64)
        program = Program(self.network, self.selections, ones.to("meta"), without_norms=True)
        state = {id(p): p.detach().double().abs() for p in self.network.parameters()}
        found: dict[int, float] = {}

        def see(nodes: list[int], values: torch.Tensor) -> None:
            found.update(zip(nodes, values.flatten(1).sum(1).log().tolist(), strict=True))

        self._run(program, ones, [program.output], see, state=state)
        for node, captured in zip(program.output.tolist(), self.captured, strict=True):
            captured.synflow_forward = found[node]

    def _redrawn(self, generator: torch.Generator, deviation: Callable[[int], float]) -> dict[int, torch.Tensor]:
        drawn = redrawn(Network(self.network, self.device, self.shared.seed), generator, deviation)
        return {id(p): drawn[name] for name, p in self.network.named_parameters()}

    def _gaussian(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn((count, *self.inputs.shape[1:]), generator=generator).to(self.inputs)

    def _zen(self) -> None:
        """What `zero_cost.passes.redrawn.zen_pass` captures, with weights drawn once for the shared network."""
        generator = Network(self.network, self.device, self.shared.seed).generator()
        samples = min(len(self.inputs), self.task.few)
        program = Program(self.network, self.selections, self.inputs[:samples])
        if not program.pools:
            raise UserError(self.task.space, "a network with global average pooling for zen")
        ends = program.pools[-1]
        for captured in self.captured:
            captured.zen = Zen([], [])
        for _ in range(self.task.repeats):
            state = self._redrawn(generator, lambda fan_in: 1.0)
            x, other = (self._gaussian(samples, generator) for _ in range(2))
            before, first = self._zen_forward(program, ends, x, state)
            after, second = self._zen_forward(program, ends, x + MIX * other, state)
            changes = {n: (f - after[n]).abs().flatten(1).double().sum(1).mean().item() for n, f in before.items()}
            # Running statistics that start from 1 and follow two forwards with momentum .1.
            running = {n: (0.81 + 0.09 * v + 0.1 * second[n]).double().mean().item() for n, v in first.items()}
            for k, captured in enumerate(self.captured):
                captured.zen.differences.append(changes[int(ends[k])])
                captured.zen.variances.append([running[int(read[k])] for read, _ in program.norms if read[k] >= 0])

    def _zen_forward(
        self, program: Program, ends: Ids, inputs: torch.Tensor, state: Mapping[int, torch.Tensor]
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """({value: features before global pooling}, {value that a BatchNorm reads: variance of each channel})."""
        features: dict[int, torch.Tensor] = {}
        variances: dict[int, torch.Tensor] = {}
        last = set(ends.tolist())

        def see(nodes: list[int], values: torch.Tensor) -> None:
            features.update((node, value) for node, value in zip(nodes, values, strict=True) if node in last)

        places = [*(made for _, made in program.norms), ends]
        self._run(program, inputs, places, see, state=state, variances=variances)
        return features, variances

    def _stages(self) -> None:
        """The spectra of `zero_cost.passes.redrawn.stages_pass`, with weights drawn once for the shared network."""
        names: Any = getattr(self.network, "stages", None)
        if not callable(names):
            raise UserError(self.task.space, "a network that names its stages()")
        generator = Network(self.network, self.device, self.shared.seed).generator()
        state = self._redrawn(generator, lambda fan_in: (2.0 / fan_in) ** 0.5)
        program = Program(self.network, self.selections, self.inputs, stages=names())
        found: dict[int, torch.Tensor] = {}

        def see(nodes: list[int], values: torch.Tensor) -> None:
            found.update((node, covariance_eigenvalues(value)) for node, value in zip(nodes, values, strict=True))

        self._run(program, self._gaussian(len(self.inputs), generator), program.stages, see, state=state)
        for k, captured in enumerate(self.captured):
            captured.stages = Stages([found[int(ids[k])] for ids in program.stages], [])


class _CodeSums:
    """Per architecture the sums over its ReLU calls that the proxies of codes read."""

    def __init__(self, program: Program, samples: int, few: int, device: torch.device, live: bool):
        self.few = min(few, samples)
        self.bits = 2.0 ** torch.arange(min(self.few, 24), device=device)
        # One sum over calls that do not lead to the logits, one over those that do.
        self.agreements = torch.zeros(program.count, 2, samples, samples, dtype=torch.float64, device=device)
        self.units = np.zeros((program.count, 2), np.int64)
        self.calls = np.zeros((program.count, 2), np.int64)
        self.patterns = torch.zeros(program.count, 1 << len(self.bits), dtype=torch.bool, device=device)
        self._buffer = torch.empty(0, dtype=torch.int8, device=device)
        reached: list[set[int]] = []
        if live:
            by_output = {node: program.behind({node}) - program.constant for node in set(program.output.tolist())}
            reached = [by_output[node] for node in program.output.tolist()]
        self.users: dict[int, dict[tuple[int, int], int]] = {}  # value -> {(architecture, alive): calls}
        for read, made in program.relus:
            for arch in np.flatnonzero(read >= 0).tolist():
                alive = int(live and int(made[arch]) in reached[arch])
                users = self.users.setdefault(int(read[arch]), {})
                users[arch, alive] = users.get((arch, alive), 0) + 1
                self.calls[arch, alive] += 1

    def see(self, users: dict[tuple[int, int], int], value: torch.Tensor) -> None:
        """value: [samples, ...], what a ReLU reads."""
        if value.dim() < 2:
            return
        # The order of the units does not matter, so it is that of the memory.
        rows = (value if value.is_contiguous() or value.dim() != 4 else value.permute(0, 2, 3, 1)).flatten(1)
        if self._buffer.numel() < rows.numel():
            self._buffer = torch.empty(rows.numel(), dtype=torch.int8, device=rows.device)
        signs = torch.gt(rows, 0, out=self._buffer[: rows.numel()].view(rows.shape))
        both, count = common_units(signs), rows.shape[1]
        active = both.diagonal()
        agreement = 2 * both + count - active[:, None] - active[None, :]
        for (arch, alive), calls in users.items():
            self.agreements[arch, alive].add_(agreement, alpha=calls)
            self.units[arch, alive] += calls * count
        if value.dim() >= 4:
            patterns = (self.bits @ signs[: len(self.bits)].float()).long()
            if len(users) > 4:
                patterns = patterns.unique()
            for arch in {arch for arch, _ in users}:
                self.patterns[arch, patterns] = True

    def of(self, arch: int) -> Codes:
        """The codes of one architecture, with calls added up."""
        kinds = [k for k in (0, 1) if self.calls[arch, k]]
        patterns = self.patterns[arch].nonzero().flatten().to(torch.int32)
        agreements = [self.agreements[arch, k] for k in kinds]
        return Codes(
            agreements, [int(self.units[arch, k]) for k in kinds], [bool(k) for k in kinds], patterns, self.few
        )


class _MapSums:
    """Per architecture the sums over its feature maps of proxies that are such sums."""

    def __init__(self, program: Program, proxies: Mapping[str, Proxy]):
        self.proxies, self.count = proxies, program.count
        self.users: dict[int, tuple[int, dict[int, int]]] = {}  # value -> (itself, {architecture: leaf modules})
        for made in program.leaves:
            for arch in np.flatnonzero(made >= 0).tolist():
                users = self.users.setdefault(int(made[arch]), (int(made[arch]), {}))[1]
                users[arch] = users.get(arch, 0) + 1
        self.maps: dict[torch.Size, list[tuple[int, torch.Tensor]]] = {}
        self.sums = {name: np.zeros(self.count) for name in proxies}

    def see(self, users: tuple[int, dict[int, int]], value: torch.Tensor) -> None:
        """value: [samples, channels, ...]"""
        kept = self.maps.setdefault(value.shape[1:], [])
        kept.append((users[0], value[0].flatten(1).clone()))
        if len(kept) >= 256:
            self._add(kept)

    def totals(self) -> dict[str, np.ndarray]:
        """{proxy: [architectures]}"""
        for kept in self.maps.values():
            self._add(kept)
        return self.sums

    def _add(self, kept: list[tuple[int, torch.Tensor]]) -> None:
        """Score the maps of one shape, all at once, and forget them."""
        if not kept:
            return
        maps = torch.stack([feature for _, feature in kept])
        finite = torch.isfinite(maps).flatten(1).all(1)
        for name, proxy in self.proxies.items():

            def alone(feature: torch.Tensor, proxy: Proxy = proxy) -> Any:
                captured = Captured()
                captured.features = [feature]
                return proxy.compute(captured)

            scores = torch.vmap(alone)(maps.nan_to_num(0, 0, 0)).where(finite, math.nan).tolist()
            for (node, _), score in zip(kept, scores, strict=True):
                for arch, times in self.users[node][1].items():
                    self.sums[name][arch] += times * score
        kept.clear()


def channels_last(inputs: torch.Tensor) -> torch.Tensor:
    """Images with channels innermost on a CPU, where convolutions of few channels run several times as fast so."""
    if inputs.dim() == 4 and inputs.device.type == "cpu":  # a copy, for one channel fits either way
        return torch.empty_like(inputs, memory_format=torch.channels_last).copy_(inputs)
    return inputs
