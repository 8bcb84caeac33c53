"""Supernet: a module with Choices whose candidates are mixed by architecture parameters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nas.supernet.edges import edges_into_nodes
from nas.supernet.mixed import Mixed
from nas.supernet.relaxation import Relaxation, Weights
from nas.supernet.weighted import JOINED_CHANNELS, prepare
from search_spaces.choice import Choice, find_choices, select
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.layered import LayeredSpace
from search_spaces.space import SearchSpace

EDGE_LABELS = "labels `<cell>_<source>_<node>` on the edges into a node, as NAS-Bench-201 and DARTS have"


@dataclass(frozen=True)
class PartialChannels:
    """One in `k` channels goes through the edges' candidates. narrow: the network of choices with channels / k."""

    k: int
    narrow: nn.Module


@dataclass(frozen=True)
class Draw:
    """What one forward pass uses. weights: by label that is not fixed; scales: factor of each edge, by its label."""

    weights: Mapping[str, Weights]
    scales: Mapping[str, torch.Tensor]


class Supernet(nn.Module):
    """`network` with every Choice, nested ones too, replaced by a Mixed; places that share a label share parameters.

    The network is changed in place. generator: on the CPU; makes the architecture parameters (1e-3 N(0, 1), as DARTS)
    and then every draw, so its state belongs into a checkpoint. Weights of candidates are drawn once per forward pass,
    for all cells together.

    edge_normalisation: every edge is scaled by the softmax of `betas` over the edges into its node (Xu et al.,
    PC-DARTS, ICLR 2020, section 3.3). Its edges, and those with partial channels, are
    found by their labels (`nas.supernet.edges`).
    checkpointed: mixtures keep no activations for backward but compute them again. joined: on a CPU convolutions of a
    mixture with at most so many channels are computed as one, which changes the rounding.
    progress: attribute, 0 to 1, the share of the search that is done; set by the loop, read by temperature schedules.
    kept: attribute, {label: the candidates that a restricted label still has}; see `restrict`.

    Errors: UserError for a module without Choices, for labels that name no edges where they must, for a narrow network
    that has other Choices.
    """

    def __init__(
        self,
        network: nn.Module,
        relaxation: Relaxation,
        *,
        generator: torch.Generator,
        partial: PartialChannels | None = None,
        edge_normalisation: bool = False,
        checkpointed: bool = False,
        joined: int = JOINED_CHANNELS,
    ):
        super().__init__()
        labels = find_choices(network)
        if not labels:
            raise UserError(type(network).__name__, "a module with a Choice in it")
        nodes = edges_into_nodes(labels)
        if (partial or edge_normalisation) and not nodes:
            raise UserError(list(labels), EDGE_LABELS)
        edges = {label for entering in nodes.values() for label in entering} if partial else set()
        self.relaxation, self.generator, self.progress = relaxation, generator, 0.0
        self.network = _Replacement(partial, edges, checkpointed, joined)(network)
        found = find_choices(self.network)
        self.labels = tuple(found)
        self.nodes = nodes if edge_normalisation else {}
        self.fixed: set[str] = set()
        self.kept: dict[str, tuple[int, ...]] = {}
        self._silent: dict[str, frozenset[int]] = {}
        self._mixed: dict[str, list[Choice]] = found
        # Lists, as a label may be no name of a parameter.
        self._alphas = nn.ParameterList(_initial(len(found[label][0].candidates), generator) for label in found)
        self._betas = nn.ParameterList(_initial(len(entering), generator) for entering in self.nodes.values())

    @property
    def alphas(self) -> dict[str, nn.Parameter]:
        """{label: [candidates]}."""
        return dict(zip(self.labels, self._alphas))

    @property
    def betas(self) -> dict[str, nn.Parameter]:
        """{`<cell>_<node>`: [edges into it]}, empty without edge normalisation."""
        return dict(zip(self.nodes, self._betas))

    def architecture_parameters(self) -> list[nn.Parameter]:
        """All alphas, then all betas."""
        return [*self._alphas, *self._betas]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All parameters of the network, those of every candidate included."""
        return list(self.network.parameters())

    def draw(self) -> Draw:
        """The weights of one forward pass; to be given to several where they must see the same ones."""
        weights = {label: self._weights(label, a) for label, a in self.alphas.items() if label not in self.fixed}
        return Draw(weights, self.scales())

    def scales(self) -> dict[str, torch.Tensor]:
        """The factor of each edge by its label, where edges are normalised and not all into their node are fixed."""
        found: dict[str, torch.Tensor] = {}
        for node, beta in self.betas.items():
            if not self.fixed.issuperset(self.nodes[node]):
                found.update(zip(self.nodes[node], beta.softmax(0)))
        return found

    def _weights(self, label: str, alpha: torch.Tensor) -> Weights:
        kept = self.kept.get(label)
        if kept is None:
            found = self.relaxation.draw(alpha, self.generator, self.progress)
        else:
            inner = self.relaxation.draw(alpha[list(kept)], self.generator, self.progress)
            places = torch.tensor(kept, device=alpha.device)
            values = torch.zeros_like(alpha, requires_grad=False).scatter(0, places, inner.values)
            active = kept if inner.active is None else tuple(kept[k] for k in inner.active)
            found = Weights(values, active, inner.gated)
        silent = self._silent.get(label)
        if silent is None:
            return found
        running = range(len(alpha)) if found.active is None else found.active
        values = found.values * torch.tensor([k not in silent for k in range(len(alpha))]).to(found.values)
        # Something has to run, at weight zero, so that the output has its shape.
        return Weights(values, tuple(k for k in running if k not in silent) or tuple(running[:1]), found.gated)

    @contextlib.contextmanager
    def drawn(self, draw: Draw | None = None) -> Iterator[nn.Module]:
        """The network while its mixtures have the weights of `draw` (None: a new one), for calls other than forward."""
        draw = self.draw() if draw is None else draw
        try:
            for label, places in self._mixed.items():
                for place in places:
                    place.weights, place.scale = draw.weights.get(label), draw.scales.get(label)  # type: ignore[assignment]
            yield self.network
        finally:
            for places in self._mixed.values():
                for place in places:
                    place.weights = place.scale = None  # type: ignore[assignment]

    def forward(self, *inputs: Any, draw: Draw | None = None) -> Any:
        with self.drawn(draw) as network:
            return network(*inputs)

    def select(self, selection: Mapping[str, int]) -> None:
        """Fix labels: {label: the one candidate that runs, with weight one}; `space.select(arch)` fixes all of them.

        Other labels stay as they are. Where all edges into a node are fixed, none is scaled any more: the supernet then
        computes what `space.build(arch)` does with the weights of `selected_state_dict(supernet.network)`.
        Errors: UserError for an unknown label or index.
        """
        select(self.network, selection)
        self.fixed |= set(selection)

    def release(self, labels: Sequence[str] | None = None) -> None:
        """Let fixed labels be mixed again, all by default. Errors: UserError for an unknown label."""
        for label in labels or ():
            if label not in self.labels:
                raise UserError(label, f"a label of this supernet ({one_of(self.labels)})", nearest(label, self.labels))
        self.fixed -= set(self.labels if labels is None else labels)

    def restrict(self, label: str, kept: Sequence[int]) -> None:
        """Let a label's draw go over the candidates `kept` alone; the others have weight zero and do not run.

        Restrictions replace each other; all candidates lift them. Alphas stay as they are. Errors: UserError for an
        unknown label, no candidate, one twice, one that is not there.
        """
        if label not in self.labels:
            raise UserError(label, f"a label of this supernet ({one_of(self.labels)})", nearest(label, self.labels))
        count = len(self.alphas[label])
        wanted = tuple(sorted(int(k) for k in kept))
        if not wanted or len(set(wanted)) < len(wanted) or not 0 <= wanted[0] <= wanted[-1] < count:
            raise UserError(list(kept), f"different candidates from 0 to {count - 1} for {label!r}, at least one")
        self.kept.pop(label, None)
        if len(wanted) < count:
            self.kept[label] = wanted

    def candidates_of(self, label: str) -> tuple[int, ...]:
        """The candidates that a label has: all, or those it is restricted to."""
        return self.kept.get(label, tuple(range(len(self.alphas[label]))))

    @contextlib.contextmanager
    def without(self, label: str, candidates: Sequence[int] | None = None) -> Iterator[None]:
        """Inside, the weights of these candidates (None: of all) are zero in every draw; the others keep theirs."""
        before = self._silent
        silent = range(len(self.alphas[label])) if candidates is None else candidates
        self._silent = {**before, label: before.get(label, frozenset()) | frozenset(silent)}
        try:
            yield
        finally:
            self._silent = before


def supernet_of(
    space: SearchSpace,
    relaxation: Relaxation,
    *,
    generator: torch.Generator,
    partial: int = 1,
    edge_normalisation: bool = False,
    checkpointed: bool = False,
    **scale: Any,
) -> Supernet:
    """The supernet of `space.choices(**scale)`. partial: k of partial channels, 1 for none; PC-DARTS has 4 on CIFAR-10.

    Errors: UserError as Supernet's, and where k does not divide the channels.
    """
    narrow = None
    if partial != 1:
        channels = scale["channels"] if "channels" in scale else _default_channels(space)
        if partial < 1 or channels % partial:
            raise UserError(partial, f"k of partial channels, one that divides the {channels} channels")
        narrow = PartialChannels(partial, space.choices(**{**scale, "channels": channels // partial}))
    return Supernet(
        space.choices(**scale),
        relaxation,
        generator=generator,
        partial=narrow,
        edge_normalisation=edge_normalisation,
        checkpointed=checkpointed,
    )


def _default_channels(space: SearchSpace) -> int:
    inner = space.space if isinstance(space, LayeredSpace) else space
    found = inspect.signature(inner.choices).parameters.get("channels")
    if found is None or not isinstance(found.default, int):
        raise UserError(space.name, "a space with channels, or channels=<number> beside partial channels")
    return found.default


def _initial(count: int, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(1e-3 * torch.randn(count, generator=generator))


class _Replacement:
    """Puts a Mixed in place of every Choice of a module; edges with partial channels get the narrow candidates."""

    def __init__(self, partial: PartialChannels | None, edges: set[str], checkpointed: bool, joined: int):
        self.partial, self.edges, self.checkpointed, self.joined = partial, edges, checkpointed, joined
        self.made: dict[int, Mixed] = {}  # one Choice at several places stays one

    def __call__(self, module: nn.Module) -> nn.Module:
        return self._replaced(module, self.partial.narrow if self.partial else module, self.checkpointed)

    def _replaced(self, module: nn.Module, narrow: nn.Module | None, checkpointed: bool) -> nn.Module:
        if isinstance(module, Mixed):
            return module
        if not isinstance(module, Choice):
            for name, child in module._modules.items():
                if child is not None:
                    counterpart = None if narrow is None else narrow._modules.get(name)
                    module._modules[name] = self._replaced(child, counterpart, checkpointed)
            return module
        if id(module) not in self.made:
            k, source = 1, module
            if self.partial and module.label in self.edges:
                if not isinstance(narrow, Choice) or len(narrow.candidates) != len(module.candidates):
                    raise UserError(module.label, "a narrow network with the same Choices at the same places")
                k, source = self.partial.k, narrow
            # Within a checkpointed mixture everything is computed again anyway.
            candidates = [
                prepare(self._replaced(candidate, _candidate(narrow, index), False))
                for index, candidate in enumerate(source.candidates)
            ]
            self.made[id(module)] = Mixed(
                candidates, module.label, partial=k, checkpointed=checkpointed, joined=self.joined
            )
        return self.made[id(module)]


def _candidate(choice: nn.Module | None, index: int) -> nn.Module | None:
    return choice.candidates[index] if isinstance(choice, Choice) else None
