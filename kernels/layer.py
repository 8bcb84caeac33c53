"""FusedLayer: a GraphLayer that runs as one operator where kernels can run, and as before elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from kernels import operators  # registers them
from kernels.backend import by_operator, check_dense, recomputing, resolve
from kernels.lower import lower
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.plan import Step, buffer_names


@dataclass(frozen=True, slots=True)
class Source:
    """One mode of a layer for the operator: the program as text, what it is differentiated by, and the names of the
    layer's tensors that are its inputs and of the buffers that its moments update, in order."""

    text: str
    wrt: str
    flat: bool
    tensors: tuple[str, ...]
    updated: tuple[str, ...]


def make_source(graph: LayerGraph, layout: str, training: bool, track: bool) -> Source:
    """A layer's program in training or evaluation. Errors: Unsupported if kernels cannot express the graph."""
    lowered = lower(graph, layout=layout, training=training, track=track)
    buffers = {s.name: buffer_names(graph)[s.id] for s in lowered.statistics}
    names = [name for name in lowered.program.inputs if name != "x"]
    outputs = {name for name, _ in lowered.program.outputs}
    return Source(
        lowered.program.to_text(),
        ",".join(["x", *(name for name in names if name not in buffers)]),
        lowered.flat,
        tuple(buffers.get(name, name) for name in names),
        tuple(buffer for name, buffer in buffers.items() if name in outputs),
    )


class FusedLayer(GraphLayer):
    """A GraphLayer with the same parameters, buffers and state dict; arguments as there, and a backend.

    Where kernels run (see `kernels.backend`), forward and backward are one operator each, which keep x and small
    statistics only; elsewhere, for float64, during export, and for batch statistics of several processes
    (`synchronize`), the GraphLayer's own forward runs. Statistics and arithmetic are float32. Running statistics are
    updated once also where a checkpoint computes the layer again, and not by an empty batch.
    Errors: as GraphLayer; Unsupported for a graph that kernels cannot express; UserError for tensors that are not
    dense and floating, and an unknown backend.
    """

    backend: str
    _replaced: tuple[GraphLayer, ...] | None
    _sources: dict[bool, Source]

    def __init__(self, graph: LayerGraph, channels: int, *, backend: str = "auto", **settings: Any):
        self.__dict__["backend"] = resolve(backend)
        self.__dict__["_replaced"] = None
        super().__init__(graph, channels, **settings)

    @classmethod
    def of(cls, layer: GraphLayer, backend: str = "auto") -> FusedLayer:
        """The fused form of a layer. The two share their parameters, buffers, hooks and settings."""
        fused = cls.__new__(cls)
        fused.__dict__.update(layer.__dict__, backend=resolve(backend), _replaced=(layer,))
        fused._make_plans()
        return fused

    def unfused(self) -> GraphLayer:
        """The layer that this one was made of, in its present state; a new one with the same tensors if of none."""
        layer: GraphLayer = self._replaced[0] if self._replaced else GraphLayer.__new__(GraphLayer)
        own = {k: v for k, v in self.__dict__.items() if k not in ("backend", "_replaced", "_sources")}
        layer.__dict__.update(own)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        check_dense(x)
        if not by_operator(x, self.backend) or self._synchronized():
            return super().forward(x)
        plan = self._plans.get(x.ndim)
        if plan is None or x.shape[plan.channel] != self.channels:
            raise self._misfit(x)
        source = self._sources[self.training]
        outputs = torch.ops.nasforge.graph_forward(
            x,
            [getattr(self, name) for name in source.tensors],
            source.text,
            source.wrt if torch.is_grad_enabled() else "",
            self.layout,
            source.flat,
            self.graph.group_count(self.channels),
            self.backend == "reference",
        )
        if source.updated and x.numel() and not recomputing():
            self._keep(source.updated, outputs)
        return outputs[0]

    def _keep(self, names: tuple[str, ...], outputs: list[Tensor]) -> None:
        """Update running statistics by the outputs behind y."""
        with torch.no_grad():
            if self.graph.momentum is None:
                self.num_batches_tracked.add_(1)
            for name, moment in zip(names, outputs[1:], strict=False):  # saved statistics follow
                running = getattr(self, name)
                step = moment.to(running.dtype) - running
                running.add_(
                    step / self.num_batches_tracked if self.graph.momentum is None else step * self.graph.momentum
                )

    def _update(self, step: Step, moment: Tensor, count: Any) -> None:
        if not (isinstance(count, int) and count == 0) and not recomputing():
            super()._update(step, moment, count)

    def _synchronized(self) -> bool:
        """Whether batch statistics are those of several processes, which the kernels do not exchange."""
        of_batch = self.training or not self.track_running_stats
        if not (self.synchronize and of_batch and self.graph.batch_aggregates()):
            return False
        distributed = torch.distributed
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def _make_plans(self) -> None:
        super()._make_plans()
        self._sources = {
            training: make_source(self.graph, self.layout, training, self.track_running_stats)
            for training in (True, False)
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_sources"}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"


__all__ = ["FusedLayer", "Source", "make_source", "operators"]
