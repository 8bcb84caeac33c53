"""TrainEvaluator: what an architecture is worth when it is trained; a shorter training can be gone on with."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.evaluators import Rejected
from nas.training.batches import make_batches
from nas.training.data import Dataset, load_data
from nas.training.loop import check_model
from nas.training.paused import PausedTraining
from nas.training.presets import preset as find_preset
from nas.training.recipe import Recipe
from nas.training.task import Task
from search_spaces.common.errors import UserError
from search_spaces.common.files import home
from search_spaces.registry import load_space, space_names
from search_spaces.space import SearchSpace

METRICS = ("val_acc", "val_loss", "train_loss", "params", "macs", "live_macs", "train_seconds", "cost_seconds")
RUNGS = 4  # how many fidelities are offered
FACTOR = 3  # between them


@dataclass(frozen=True)
class TrainEvaluator:
    """Trains an architecture on the training images and measures it on the validation images, never on test images.

    space: its name or `package.module:object`; network: keywords of its `build`. norm, act, layer, data, root, size,
    val_share, split_seed, skip_broken: as in `Task`. train_seed: of weights, order and augmentation, the same for all
    architectures (as NAS-Bench-201 has its three seeds). The trial's own seed is not used: a promoted architecture
    comes back as another trial, and its training could not go on. So all trials of an architecture agree, and `nas
    train` with this seed repeats one.
    own_schedule: a fidelity of e epochs is a training of e epochs with a learning rate that falls to its end, as in
    the 12-epoch columns of NAS-Bench-201; such trainings cannot go on. Otherwise a fidelity is the beginning of the
    whole training, and going on gives bit for bit what training at once gives (on a CPU).
    threads: of one training, whatever the number of workers, since sums may differ in the last bit between numbers of
    threads. cache: whether results and paused trainings are kept in $NASFORGE_HOME/cache/training and shared by all
    searches. account: who pays, see `PausedTraining.reach`; a run's own name makes its clock independent of others.

    Metrics: `val_acc` (percent), `val_loss`, `train_loss` (mean of the last epoch), `params`, `macs` and `live_macs`
    where the space states costs, `train_seconds` (measured, from the first step, with evaluation) and `cost_seconds`:
    the part of them that this fidelity adds to what the account had trained before. Both are measured, hence depend
    on the machine, and so does a budget in simulated seconds.
    Raises Rejected with `non_finite`. Errors: UserError.
    """

    space: str
    recipe: Recipe
    network: Mapping[str, Any] = field(default_factory=dict)
    norm: str | None = None
    act: str | None = None
    layer: str | None = None
    data: str = "digits"
    root: str | None = None
    size: int | None = None
    val_share: float = 0.1
    split_seed: int = 0
    skip_broken: bool = False
    train_seed: int = 0
    own_schedule: bool = False
    device: str = "cpu"
    threads: int = 1
    cache: bool = True
    account: str = ""

    def __post_init__(self) -> None:
        space = load_space(self.space)
        inner = getattr(space, "space", space)  # of a product with layers
        if type(inner).build is SearchSpace.build or "in_features" in inspect.signature(inner.build).parameters:
            images = [n for n in space_names() if n != "layers" and "graph" not in n]
            hint = " (`nas layers search` trains layers)" if space.name == "layers" else ""
            raise UserError(self.space, f"a space whose networks take images ({', '.join(images)}){hint}")
        if self.recipe.patience is not None:
            raise UserError(self.recipe.patience, "no patience in a search: its fidelities say when a training ends")
        if not self.val_share:
            raise UserError("--val-share", "a share of validation images, which a search needs, such as 0.5")
        if self.threads < 1:
            raise UserError(self.threads, "at least one thread")
        self.task("")

    # -- settings ----------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """Plain values; `TrainEvaluator.from_json` inverts it."""
        return asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> TrainEvaluator:
        """The evaluator that `as_json` wrote."""
        return TrainEvaluator(**{**found, "recipe": Recipe(**found["recipe"])})

    def task(self, arch: str, fidelity: int | None = None) -> Task:
        """The training of an architecture, in the space's notation."""
        own = {f.name: getattr(self, f.name) for f in fields(Task) if hasattr(self, f.name)}
        if self.own_schedule and fidelity is not None:
            if self.recipe.epochs is not None:
                own["recipe"] = replace(self.recipe, epochs=fidelity)
            else:
                own["recipe"] = replace(self.recipe, steps=self.steps(fidelity))
        return Task(arch=arch, **own)

    def steps(self, fidelity: int | None) -> int:
        """The steps of so many epochs. Errors: UserError for more than the recipe has."""
        per_epoch, total = self._lengths()
        epochs = math.ceil(total / per_epoch)
        if fidelity is not None and not 1 <= fidelity <= epochs:
            raise UserError(fidelity, f"a fidelity from 1 to {epochs}, the epochs of the training", str(epochs))
        return total if fidelity is None else min(fidelity * per_epoch, total)

    def fidelities(self) -> list[int]:
        """Up to four numbers of epochs, a factor of 3 apart, the last one those of the recipe."""
        per_epoch, total = self._lengths()
        epochs = math.ceil(total / per_epoch)
        return sorted({max(1, round(epochs / FACTOR**k)) for k in range(RUNGS)})

    def check(self) -> None:
        """Make a network and a batch, so that what does not fit shows before a search. Errors: UserError."""
        space = load_space(self.space)
        data, _ = self._opened()
        arch = space.encode(space.sample(np.random.default_rng(0)))
        check_model(self.task(arch).make_network(data, seed=self.train_seed).to(self.device), data)
        self.steps(None)

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, arch: Any, fidelity: int | None = None, *, seed: int) -> dict[str, float]:
        """Metrics after `fidelity` epochs, None for the whole training (a last part of an epoch counts as one)."""
        space = load_space(self.space)
        with _threads(self.threads):
            training = self.training(space.encode(arch), fidelity)
            milestone, added = training.reach(self.steps(fidelity), self.account)
        if milestone.metrics is None:
            raise Rejected("non_finite", added)
        times = {"train_seconds": milestone.seconds, "cost_seconds": added}
        return {**milestone.metrics, **self._costs(space, arch, training.data), **times}

    def training(self, arch: str, fidelity: int | None = None) -> PausedTraining:
        """The training that a fidelity of an architecture is a part of."""
        data, about = self._opened()
        task = self.task(arch, fidelity)
        folder = None
        if self.cache:
            folder = home() / "cache" / "training" / self._digest(task, about)
        return PausedTraining(task, data, self.train_seed, self.device, folder)

    def _digest(self, task: Task, about: Mapping[str, Any]) -> str:
        """The same for trainings that give the same; data count by what they hold, not by where they lie."""
        named = {k: v for k, v in task.as_json().items() if k not in _DATA}
        named["recipe"] = {k: v for k, v in named["recipe"].items() if k != "source"}
        named["layer"], named["norm"] = _content(self.layer), _content(self.norm)
        named["code"] = [_code(str(named[key])) for key in ("space", "factory")]
        named |= {"data": about, "seed": self.train_seed, "threads": self.threads, "device": self.device}
        text = json.dumps(named, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _costs(self, space: SearchSpace, arch: Any, data: Dataset) -> dict[str, float]:
        """`macs` and `live_macs`; normalisations and activations have none."""
        channels, height, width = data.shape
        if height != width:
            return {}
        network = {k: v for k, v in self.network.items() if k != "auxiliary"}
        try:
            found = space.cost(arch, in_channels=channels, num_classes=data.num_classes, input_size=height, **network)
        except UserError:  # a space that states no costs
            return {}
        return {name: float(found[name]) for name in ("macs", "live_macs")}

    def _lengths(self) -> tuple[int, int]:
        """(steps of an epoch, steps of the recipe)."""
        data, _ = self._opened()
        per_epoch = make_batches(data, self.recipe, seed=0).steps_per_epoch
        return per_epoch, self.recipe.resolved(per_epoch).steps

    def _opened(self) -> tuple[Dataset, dict[str, Any]]:
        return _open(self.data, self.root, self.size, self.val_share, self.split_seed, self.skip_broken, self.device)


_DATA = ("data", "root", "size", "val_share", "split_seed", "skip_broken")


@functools.lru_cache(maxsize=2)
def _open(name, root, size, val_share, split_seed, skip_broken, device) -> tuple[Dataset, dict[str, Any]]:
    """The images on the device and their description, opened once in each process."""
    data = load_data(name, root=root, size=size, val_share=val_share, seed=split_seed, skip_broken=skip_broken)
    return data.to(device), data.describe()


def _content(name: str | None) -> str | None:
    """A layer's name; of one in a file or a run its identity, since those can change."""
    from search_spaces.layers.identity import fingerprint

    if name is None or (":" not in name and "/" not in name and not name.endswith(".json")):
        return name
    from nas.layers.references import find_layer

    return fingerprint(find_layer(name))


def _code(name: str) -> str | None:
    """A hash of the file in which `package.module:object` stands, since it can change; what it imports is not read."""
    module = sys.modules.get(name.partition(":")[0])
    path = getattr(module, "__file__", None)
    if ":" not in name or path is None:
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_evaluator(
    space: str,
    preset: str = "digits-tiny",
    *,
    changes: Mapping[str, Any] | None = None,
    scale: Mapping[str, Any] | None = None,
    val_share: float | None = None,
    **settings: Any,
) -> TrainEvaluator:
    """The evaluator of a preset: its recipe with `changes`, its network (if it is for this space) with `scale`.

    val_share: None for the preset's. settings: further fields of TrainEvaluator. Errors: UserError.
    """
    found = find_preset(preset)
    network = dict(found.network) if found.space == load_space(space).name else {}
    return TrainEvaluator(
        space,
        found.recipe.replaced(dict(changes or {})),
        network={**network, **(scale or {})},
        val_share=found.val_share if val_share is None else val_share,
        **settings,
    )
