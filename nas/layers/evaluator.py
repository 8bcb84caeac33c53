"""LayerEvaluator: what a normalisation-activation layer is worth inside small anchor networks."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.evaluators import Rejected
from nas.layers.anchors import anchor, check_size, layout_of
from nas.layers.cache import cached_result
from nas.layers.cost import activation_bytes, step_milliseconds
from nas.layers.quality import Behind, Doomed, verdict
from nas.layers.signal import signal
from nas.layers.stability import stability
from nas.training.data import Dataset, load_data
from nas.training.loop import Callback, advance, late_loss, start, train
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError
from search_spaces.common.files import home
from search_spaces.layers.catalog import layer
from search_spaces.layers.graph import LayerGraph
from search_spaces.layers.identity import fingerprint
from search_spaces.layers.module import GraphLayer

MEASURES = ("latency_ms", "activation_bytes")
STABILITY_BATCH = 8


@dataclass(frozen=True)
class LayerEvaluator:
    """The dear end of the funnel: signal propagation, stability, proxy training with a quality limit on every anchor.

    data, root, size: the images (`load_data`). anchors: their names, the first one sees every candidate and stops
    what does not begin to learn. width: channels of an anchor's first stage. recipe: the proxy training.
    signal: whether noise is sent through a deep residual network first. stability_steps: of the gradient-norm ascent, 0
    for none. times_chance: an anchor must reach so many times the
    accuracy of guessing. screen_steps: 0, or after how many steps a training in the first anchor ends unless its
    mean loss over the last half of them is within `screen_margin` of what the catalogue layer `reference` had by
    then. train_seed: of weights and data order, the same for all layers, so that differences are
    the layers'. measure: further metrics, of MEASURES. cache: whether results are kept and shared
    ($NASFORGE_HOME/cache/layers.sqlite).

    Metrics: `val_acc`, the mean over anchors; `<anchor>_val_acc`; `<anchor>_train_loss` (mean over the last half);
    `cost_seconds`, which counts training steps, so that budgets do not depend on the machine.
    Raises Rejected with `no_signal`, `unstable`, `non_finite` or `low_accuracy`.
    """

    data: str = "digits"
    root: str | None = None
    size: int | None = None
    anchors: tuple[str, ...] = ("resnet",)
    width: int = 8
    recipe: Recipe = field(default_factory=Recipe)
    signal: bool = True
    stability_steps: int = 5
    times_chance: float = 2.0
    screen_steps: int = 0
    screen_margin: float = 0.2
    reference: str = "bn-relu"
    train_seed: int = 0
    measure: tuple[str, ...] = ()
    cache: bool = True

    def __post_init__(self) -> None:
        if not self.anchors:
            raise UserError("--anchors", "at least one anchor")
        if {layout_of(name) for name in self.anchors} != {layout_of(self.anchors[0])}:
            raise UserError(",".join(self.anchors), "anchors of one layout (vit has tokens, the others images)")
        for name in self.measure:
            if name not in MEASURES:
                raise UserError(name, f"a measure: {' or '.join(MEASURES)}")

    @property
    def layout(self) -> str:
        """The layout of the layers: `channels-first` or `tokens`."""
        return layout_of(self.anchors[0])

    def dataset(self) -> Dataset:
        """The images, opened once in each process. Errors: UserError if an anchor needs larger ones."""
        data = _dataset(self.data, self.root, self.size)
        for name in self.anchors:
            check_size(name, *data.shape[1:])
        return data

    def network(self, graph: LayerGraph, name: str, *, seed: int | None = None) -> nn.Module:
        """The anchor `name` around the layer, freshly initialised."""
        data = self.dataset()
        return anchor(
            name,
            lambda channels: GraphLayer(graph, channels, layout=self.layout),
            width=self.width,
            num_classes=data.num_classes,
            in_channels=data.shape[0],
            generator=torch.Generator().manual_seed(self.train_seed if seed is None else seed),
        )

    def evaluate(self, arch: LayerGraph, fidelity: int | None = None, *, seed: int) -> dict[str, float]:
        """Metrics of a layer; `fidelity` replaces the recipe's number of steps. The trial's seed is not used."""
        identity = fingerprint(arch)
        cost = 0.0
        metrics: dict[str, float] = {}
        if self.signal and (reason := self._signal(arch)) is not None:
            raise Rejected(reason, cost)
        if self.stability_steps:
            found = self._stability(arch, identity)
            cost += found["steps"]
            if found["reason"]:
                raise Rejected(found["reason"], cost)
        for name in self.anchors:
            found = self._train(arch, identity, name, fidelity)
            cost += found["steps"]
            if found["reason"]:
                raise Rejected(found["reason"], cost)
            metrics[f"{name}_val_acc"] = found["val_acc"]
            metrics[f"{name}_train_loss"] = found["train_loss"]
        metrics["val_acc"] = sum(metrics[f"{name}_val_acc"] for name in self.anchors) / len(self.anchors)
        metrics["cost_seconds"] = cost
        return metrics | self._measures(arch)

    def _settings(self, *names: str) -> dict[str, Any]:
        own = asdict(self)
        return {name: own[name] for name in ("data", "root", "size", "width", "train_seed", *names)}

    def _path(self) -> Path | None:
        return home() / "cache" / "layers.sqlite" if self.cache else None

    def _signal(self, graph: LayerGraph) -> str | None:
        generator = torch.Generator().manual_seed(self.train_seed)
        layout = self.layout
        return signal(lambda c: GraphLayer(graph, c, layout=layout), generator=generator, layout=layout).reason

    def _stability(self, graph: LayerGraph, identity: str) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            data = self.dataset()
            images = data.normalize(data.train.images[:STABILITY_BATCH])
            labels = data.train.labels[:STABILITY_BATCH]
            network = self.network(graph, self.anchors[0])
            found = stability(network, images, labels, steps=self.stability_steps)
            return {"reason": found.reason, "steps": found.steps}

        settings = {**self._settings("stability_steps"), "anchor": self.anchors[0]}
        return cached_result(self._path(), "stability", identity, settings, compute)

    def _train(self, graph: LayerGraph, identity: str, name: str, steps: int | None) -> dict[str, Any]:
        recipe = self.recipe if steps is None else Recipe(**{**asdict(self.recipe), "steps": steps})

        def compute() -> dict[str, Any]:
            data = self.dataset()
            callbacks: list[Callback] = []
            if name == "resnet" and recipe.steps > 30:
                callbacks.append(Doomed(data.num_classes))
            if self._screens(name, recipe):
                callbacks.append(Behind(self.screen_steps, self._reference_loss(recipe) + self.screen_margin))
            found = train(self.network(graph, name), data, recipe, seed=self.train_seed, callbacks=callbacks)
            reason = verdict(found, 100 * self.times_chance / data.num_classes)
            result: dict[str, Any] = {"reason": reason, "steps": found.steps}
            if reason is None:
                result |= {"val_acc": found.metrics["val_acc"], "train_loss": found.late_loss}
            return result

        settings = {**self._settings("times_chance"), "recipe": asdict(recipe), "anchor": name}
        if self._screens(name, recipe):
            settings |= {k: v for k, v in asdict(self).items() if k in ("screen_steps", "screen_margin", "reference")}
        return cached_result(self._path(), "training", identity, settings, compute)

    def _screens(self, name: str, recipe: Recipe) -> bool:
        return name == self.anchors[0] and 0 < self.screen_steps < recipe.steps

    def _reference_loss(self, recipe: Recipe) -> float:
        graph = layer(self.reference)

        def compute() -> dict[str, Any]:
            network = self.network(graph, self.anchors[0])
            state = start(network, self.dataset(), recipe, seed=self.train_seed)
            return {"loss": late_loss(advance(state, recipe, steps=self.screen_steps).losses)}

        settings = {**self._settings("screen_steps"), "recipe": asdict(recipe), "anchor": self.anchors[0]}
        return cached_result(self._path(), "reference", fingerprint(graph), settings, compute)["loss"]

    def _measures(self, graph: LayerGraph) -> dict[str, float]:
        if not self.measure:
            return {}
        data = self.dataset()
        batch = self.recipe.batch_size
        images, labels = data.normalize(data.train.images[:batch]), data.train.labels[:batch]
        network = self.network(graph, self.anchors[0])
        found: dict[str, float] = {}
        if "activation_bytes" in self.measure:
            found["activation_bytes"] = float(activation_bytes(network, images))
        if "latency_ms" in self.measure:
            found["latency_ms"] = step_milliseconds(network, images, labels)
        return found


@functools.lru_cache(maxsize=4)
def _dataset(name: str, root: str | None, size: int | None) -> Dataset:
    return load_data(name, root=root, size=size)
