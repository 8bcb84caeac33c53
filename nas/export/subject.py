"""What is to be exported: an architecture that a person names, a search's find, or a trained network."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.export.card import Card
from nas.run import Run
from nas.training.task import layer_factories
from search_spaces.common.errors import UserError
from search_spaces.common.names import match
from search_spaces.space import SearchSpace

TRAINABLE = ("digits", "cifar10", "cifar100")  # data sets of tables that `nas train` knows by the same name


@dataclass(frozen=True)
class Subject:
    """A network, inputs of the shape that it takes, and what its card says."""

    model: nn.Module
    example: tuple[Tensor, ...]
    card: Card


@dataclass(frozen=True)
class Build:
    """How an architecture becomes a network; None: as the space has it.

    norm, act: names; layer: a layer in place of every normalisation, with the activations left out. size: height and
    width of the example. in_channels: for graphs the features of a node. seed: of the weights.
    """

    norm: str | None = None
    act: str | None = None
    layer: str | None = None
    scale: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    in_channels: int | None = None
    size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layer is not None and (self.norm or self.act):
            raise UserError(self.layer, "a layer, or norm and act, but not both")
        for name in ("num_classes", "in_channels", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(value, f"a positive number as --{name.replace('_', '-')}")

    def options(self) -> list[str]:
        """The options of `nas train` that build the same network."""
        named = {"--norm": self.norm, "--act": self.act, "--layer": self.layer}
        words = [word for name, value in named.items() if value is not None for word in (name, value)]
        return words + [word for name, value in self.scale.items() for word in ("--scale", f"{name}={value}")]


def named_architecture(space: str, text: str, build: Build) -> Subject:
    """The architecture `text` of the space; ` # norm=<name> act=<name>` behind it names layers. Errors: UserError."""
    from search_spaces.layered import LayeredSpace
    from search_spaces.registry import load_space

    found = load_space(space)
    if not isinstance(found, LayeredSpace):  # which reads the layers itself
        text, build = _split_layers(text, build)
    words = ["nas", "train", "--space", space, "--arch", text]
    return _untrained(found, space, text, build, train=words, data=None)


WEIGHTS = ("random", "inherited")


def from_run(reference: str, build: Build, weights: str | None = None) -> Subject:
    """What RUN, RUN:best or RUN:<number> names: of a training with its weights, of a search with random ones.

    weights: `inherited` for those that the architecture shares in the supernet of a search, with the supernet's size.
    Errors: UserError, also for a search over layers, for settings in `build` that a training or a supernet has fixed,
    and for weights of a training or of a search without a supernet.
    """
    from nas.references import find_architecture

    folder, colon, _ = reference.rpartition(":")
    run = Run.open(folder if colon and not Run.exists(reference) else reference)
    kind = run.settings.get("kind")
    if kind == "layers":
        raise UserError(reference, f"a run over networks; this found a layer (nas layers export {reference} --to FILE)")
    if weights is not None:
        weights = match(weights, WEIGHTS, "weights")
    if kind == "training":
        if weights is not None:
            raise UserError("--weights", f"no such option with {reference}: it has the weights of its training")
        return _trained(reference, build)
    if weights == "inherited":
        return _inherited(reference, build)
    found = find_architecture(reference)
    settings = found.run.settings
    if found.training:
        build, words = _as_trained(build, found.training, found.record.arch), ["nas", "train", reference]
        subject = _untrained(found.space, settings["space"], found.record.arch, build, train=words, data=None)
        metrics = {name: value for name, value in (found.record.metrics or {}).items() if name != "cost_seconds"}
        source = "by the search's own training; they are not of the weights in this export"
        origin = f"{found.run.path}, trial {found.record.id}"
        training = shlex.join(words)
        card = replace(subject.card, metrics=metrics, metrics_source=source, origin=origin, training=training)
        return replace(subject, card=card)
    table = settings["evaluator"].removeprefix("table:") if settings["evaluator"].startswith("table:") else None
    data = table.partition("/")[2] if table else None
    if kind == "supernet":  # for images as those it searched on
        shape, data = settings["data"]["shape"], settings["search"]["data"]
        build = replace(
            build,
            in_channels=build.in_channels or shape[0],
            num_classes=build.num_classes or settings["data"]["num_classes"],
            size=build.size or shape[1],
        )
    words = ["nas", "train", reference]
    subject = _untrained(found.space, settings["space"], found.record.arch, build, train=words, data=data)
    metrics = {name: value for name, value in (found.record.metrics or {}).items() if name != "cost_seconds"}
    source = f"the table {table}" if table else f"the search's evaluator ({settings['evaluator']})"
    card = replace(
        subject.card,
        metrics=metrics,
        metrics_source=f"by {source}; they are not of the weights in this export",
        origin=f"{found.run.path}, trial {found.record.id}",
    )
    return replace(subject, card=card)


def _as_trained(build: Build, training: Mapping[str, Any], arch: str) -> Build:
    """`build` with what it leaves open as in the search's training: scale, layers and the shape of the images."""
    from nas.training.evaluator import TrainEvaluator

    evaluator = TrainEvaluator.from_json(training)
    data = evaluator.task(arch).open_data()
    own = build.norm or build.act or build.layer
    return Build(
        norm=build.norm if own else evaluator.norm,
        act=build.act if own else evaluator.act,
        layer=build.layer if own else evaluator.layer,
        scale={**evaluator.network, **build.scale},
        num_classes=build.num_classes or data.num_classes,
        in_channels=build.in_channels or data.shape[0],
        size=build.size or data.shape[1],
        seed=build.seed,
    )


def _untrained(
    space: SearchSpace, name: str, text: str, build: Build, *, train: list[str], data: str | None
) -> Subject:
    arch = space.decode(text)
    graphs = "in_features" in _build_parameters(space)
    net: dict[str, Any] = dict(build.scale)
    if build.num_classes is not None:
        net["num_classes"] = build.num_classes
    if build.in_channels is not None:
        net["in_features" if graphs else "in_channels"] = build.in_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(build.seed)
        layers: dict[str, Any] = layer_factories(build.norm, build.act, build.layer)
        model = space.build(arch, **net, **layers)
    example = _graph_example(space, build) if graphs else _image_example(build)
    card = Card(
        title=f"{space.name} network",
        space=name,
        arch=text,
        norm=build.norm or build.layer,
        act=build.act or ("none" if build.layer else None),
        scale=net,
        macs=None if graphs else _macs(space, arch, net, example),
        input_shape=tuple(example[0].shape[1:]),
        training=None if graphs else _train_command(train, build, data),
    )
    return Subject(model, example, card)


def _trained(reference: str, build: Build) -> Subject:
    from nas.training.trained import load_trained

    _refuse_settings(build, f"no such option with {reference}: its training has settled the network")
    trained = load_trained(reference)
    task, settings = trained.task, trained.run.settings
    example = (torch.zeros(2, *trained.data.shape),)
    shape = {"in_channels": trained.data.shape[0], "num_classes": trained.data.num_classes}
    net = {**task.network, **shape} if task.factory is None else dict(task.network)
    net.pop("auxiliary", None)  # a head for training only; it is not in the export
    macs = None
    if task.space is not None:
        from search_spaces.registry import load_space

        space = load_space(task.space)
        macs = _macs(space, space.decode(str(task.arch)), net, example)
    card = Card(
        title=f"{task.space or task.factory} network trained on {task.data}",
        space=task.space,
        arch=task.arch,
        norm=task.norm or task.layer,
        act=task.act or ("none" if task.layer and task.space else None),
        scale=net,
        macs=macs,
        input_shape=tuple(trained.data.shape),
        trained=True,
        metrics=trained.metrics,
        metrics_source="measured at the end of the training",
        data=f"{task.data} ({', '.join(trained.data.classes)})" if trained.data.num_classes <= 20 else task.data,
        preprocessing=_preprocessing(trained.data.mean, trained.data.std, trained.data.train.images.dtype),
        origin=f"{trained.run.path}, trial {trained.record.id} (seed {trained.record.seed})",
        training=settings.get("command"),
    )
    return Subject(trained.model, example, card)


def _inherited(reference: str, build: Build) -> Subject:
    from nas.supernet.inherited import load_inherited

    _refuse_settings(build, "no such option with --weights inherited: the supernet has settled the network")
    found = load_inherited(reference)
    trained, data = found.trained, found.trained.data
    example = (torch.zeros(2, *data.shape),)
    supernet = f"the {trained.task.recipe.name} supernet in {trained.run.path} (seed {trained.seed})"
    metrics = {name: value for name, value in (found.record.metrics or {}).items() if name in ("val_acc", "val_loss")}
    source = "measured by the search with these weights, on images that they were not trained on"
    if found.run.path != trained.run.path and trained.task.recipe.evolution is not None:
        source += " (BatchNorm statistics of fewer or more images than here)"
    card = Card(
        title=f"{trained.space.name} network with weights inherited from a supernet",
        space=trained.task.space,
        arch=found.arch,
        scale=trained.network,
        macs=_macs(trained.space, trained.space.decode(found.arch), trained.network, example),
        input_shape=tuple(data.shape),
        trained=True,
        metrics=metrics,
        metrics_source=source,
        data=f"{trained.task.data} ({', '.join(data.classes)})" if data.num_classes <= 20 else trained.task.data,
        preprocessing=_preprocessing(data.mean, data.std, data.train.images.dtype),
        origin=f"{found.run.path}, trial {found.record.id}; weights of {supernet}",
        training=trained.run.settings.get("command"),
    )
    return Subject(found.model, example, card)


def _refuse_settings(build: Build, expected: str) -> None:
    for name, value in vars(replace(build, seed=0)).items():
        if value not in (None, {}, 0):
            raise UserError(f"--{name.replace('_', '-')}", expected)


def _preprocessing(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> str:
    pixels = "pixels scaled to [0, 1]" if dtype == torch.uint8 else "pixels as the data have them"
    means, deviations = (", ".join(f"{value:.4f}" for value in values) for values in (mean, std))
    return f"{pixels}, then (pixel - mean) / std per channel, with mean {means} and std {deviations}"


def _split_layers(text: str, build: Build) -> tuple[str, Build]:
    """`<arch> # norm=<name> act=<name>`, the notation of `with_layers`, as an architecture and its layers."""
    arch, mark, layers = text.partition(" # ")
    if not mark:
        return text, build
    named = dict(part.partition("=")[::2] for part in layers.split())
    if set(named) != {"norm", "act"} or build.norm or build.act or build.layer:
        raise UserError(text, "an architecture, then ` # norm=<name> act=<name>` or options for these")
    return arch, replace(build, norm=named["norm"], act=named["act"])


def _build_parameters(space: SearchSpace) -> Mapping[str, Any]:
    return inspect.signature(getattr(space, "space", space).build).parameters  # with_layers has the space inside


def _image_example(build: Build) -> tuple[Tensor, ...]:
    size = build.size or 32
    return (torch.zeros(2, build.in_channels or 3, size, size),)


def _graph_example(space: SearchSpace, build: Build) -> tuple[Tensor, ...]:
    from search_spaces.cells.nas_bench_graph import DATASETS

    if build.size is not None:
        raise UserError("--size", f"no such option for {space.name}: its networks take graphs of any size")
    known = DATASETS[getattr(getattr(space, "space", space), "data_set", "cora")]
    features = build.in_channels or build.scale.get("in_features") or known["in_features"]
    return torch.zeros(4, int(features)), torch.zeros(2, 8, dtype=torch.long)


def _macs(space: SearchSpace, arch: Any, net: Mapping[str, Any], example: tuple[Tensor, ...]) -> int | None:
    try:
        return space.cost(arch, input_size=example[0].shape[-1], **net)["macs"]
    except UserError:  # a space that states no costs
        return None


def _train_command(words: list[str], build: Build, data: str | None) -> str:
    return shlex.join([*words, "--data", data if data in TRAINABLE else "cifar10", *build.options()])
