"""ScoringTask: with what data, networks and seeds architectures are scored; small plain values that travel."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import zero_cost
from nas.training.data import Dataset, load_data
from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import canonical, load_object, nearest
from search_spaces.registry import load_space
from search_spaces.space import SearchSpace
from zero_cost.definition import Proxy
from zero_cost.proxies import PROXIES

COUNTED = {"params": "params", "macs": "macs", "live-macs": "live_macs"}  # proxy -> what `space.cost` calls it
# What the passes capture that dead branches do not change; their weights have gradients of zero.
_OF_THE_FUNCTION = frozenset(
    {
        *("logits", "jacobian", "gradients", "fisher", "second_order", "batch_gradients", "sign_sums", "ntk"),
        *("synflow", "synflow_forward", "stages", "curve"),
    }
)


@dataclass(frozen=True)
class ScoringTask:
    """How architectures of a space are scored.

    space: its name or `package.module:object`. data, root, size: as in `load_data`; batches are drawn from the training
    images without augmentation and normalised. batch_size (64), batches (2): images of a batch, and how many batches
    `zico` compares. network: keywords of the space's `build`. few, repeats, regularisation: as in `zero_cost.score`.
    device, threads: where and with how many CPU threads one network is scored.

    A seed decides the initial weights (the same stream for every architecture) and the images. Errors: UserError.
    """

    space: str
    data: str = "digits"
    root: str | None = None
    size: int | None = None
    batch_size: int = 64
    batches: int = 2
    network: Mapping[str, Any] = field(default_factory=dict)
    few: int = 16
    repeats: int = 1
    regularisation: tuple[float, float] | None = None
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "batches", "few", "repeats", "threads"):
            value = getattr(self, name)
            if isinstance(value, bool) or int(value) != value or value < 1:
                raise UserError(value, f"a whole number of at least 1 for {name}")

    def opened(self) -> Dataset:
        """The data set, opened once in each process. Errors: UserError."""
        return _open(self.data, self.root, self.size)

    def batch(self, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of a seed, disjoint as long as there are enough images. Errors: UserError for too few images."""
        data = self.opened()
        if len(data.train) < self.batch_size:
            raise UserError(
                self.batch_size, f"a batch of at most {len(data.train)}, the training images of {self.data}"
            )
        order = np.random.default_rng(seed).permutation(len(data.train))
        found = []
        for k in range(self.batches):
            rows = np.take(order, range(k * self.batch_size, (k + 1) * self.batch_size), mode="wrap")
            index = torch.from_numpy(rows)
            found.append((data.normalize(data.train.images[index]), data.train.labels[index]))
        return found

    def model(self, arch: Any, seed: int) -> torch.nn.Module:
        """The network of an architecture with the weights of a seed; the global random state stays as it was."""
        data = self.opened()
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return load_space(self.space).build(
                arch, in_channels=data.shape[0], num_classes=data.num_classes, **self.network
            )

    def score(
        self, arch: Any, seed: int, proxies: Iterable[str], model: torch.nn.Module | None = None
    ) -> tuple[dict[str, float], dict[str, str]]:
        """({proxy: value}, {proxy: reason where it is NaN}) of one network (default: `model(arch, seed)`)."""
        chosen = {name: find_proxy(name) for name in proxies}
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            found = zero_cost.score(
                self.model(arch, seed) if model is None else model,
                self.batch(seed),
                chosen.values(),
                seed=seed,
                device=self.device,
                batches=self.batches,
                few=self.few,
                repeats=self.repeats,
                regularisation=self.regularisation,
            )
        finally:
            torch.set_num_threads(before)
        reasons = {name: found.reasons[p.name] for name, p in chosen.items() if p.name in found.reasons}
        return {name: found[p.name] for name, p in chosen.items()}, reasons

    def counts(self, arch: Any) -> dict[str, float]:
        """`params`, `macs` and `live-macs` by the space's closed form; {} where there is none."""
        channels, height, width = self.opened().shape
        if height != width:
            return {}
        space, classes = load_space(self.space), self.opened().num_classes
        try:
            cost = space.cost(arch, in_channels=channels, num_classes=classes, input_size=height, **self.network)
        except UserError:
            return {}
        return {proxy: float(cost[name]) for proxy, name in COUNTED.items()}

    def digest(self) -> str:
        """The same for tasks that give the same scores; it changes with the code that computes them."""
        settings = {k: v for k, v in asdict(self).items() if k not in ("data", "root", "size")}
        text = json.dumps({**settings, "data": self.opened().describe(), "code": _code()}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def proxy_names(text: str | Iterable[str]) -> list[str]:
    """Names of proxies, from a list or with commas between; `all` for every one. Errors: UserError."""
    names = text.split(",") if isinstance(text, str) else list(text)
    names = [name.strip() for name in names if name.strip()]
    if names == ["all"]:
        return list(PROXIES)
    if not names:
        raise UserError(text, f"names of proxies ({one_of(PROXIES)}), or all")
    return list(dict.fromkeys(name if ":" in name else canonical(name) for name in names))


def find_proxy(name: str) -> Proxy:
    """A proxy by name, or a user's own at `package.module:object`. Errors: UserError."""
    if ":" in name:
        found = load_object(name, "a proxy")
        if not isinstance(found, Proxy):
            raise UserError(name, "a Proxy, such as `@zero_cost.proxy(...)` makes of a function")
        return found
    if canonical(name) not in PROXIES:
        raise UserError(name, f"a proxy, see `nas proxies list` ({one_of(PROXIES)})", nearest(name, PROXIES))
    return PROXIES[canonical(name)]


_OF_LIVE_CALLS = frozenset({"codes", "live_codes", "zen"})


def follows_live_calls(proxy: Proxy) -> bool:
    """Whether a proxy sees dead branches by their ReLU and BatchNorm calls alone: where nothing with weights is dead,
    equal functions may share its value."""
    return _OF_LIVE_CALLS.issuperset(proxy.needs)


def follows_function(proxy: Proxy) -> bool:
    """Whether a proxy sees nothing of branches that do not reach the output: equal functions may share its value."""
    needs = set(proxy.needs)
    if "live_codes" in needs:  # the codes of ReLUs that a backward pass reaches
        needs -= {"codes", "live_codes"}
    return needs <= _OF_THE_FUNCTION


MOST_CLASSES = 100_000


@functools.lru_cache(maxsize=4)
def _first_of_class(space_text: str) -> dict[str, Any]:
    space = load_space(space_text)
    first: dict[str, Any] = {}
    for arch in space:
        first.setdefault(space.function_key(arch), arch)
    return first


def representative(space: SearchSpace, space_text: str, arch: Any) -> Any:
    """The architecture that stands for all that compute the same function: the first of the space's own order.

    In NAS-Bench-201 that is the one with every dead edge `none`. Spaces that cannot be enumerated, or have more than
    100,000 architectures, stand each for itself.
    """
    if type(space).function_key is SearchSpace.function_key and type(space).key is SearchSpace.key:
        return arch
    try:
        small = len(space) <= MOST_CLASSES
    except (UserError, OverflowError):
        small = False
    return _first_of_class(space_text)[space.function_key(arch)] if small else arch


def nothing_dead(space: SearchSpace, arch: Any, standing: Any) -> bool:
    """Whether `arch` has as many weights as the representative of its class: no dead branch has any."""
    try:
        return arch == standing or space.cost(arch)["params"] == space.cost(standing)["params"]
    except UserError:
        return False


@functools.lru_cache(maxsize=2)
def _open(name: str, root: str | None, size: int | None) -> Dataset:
    return load_data(name, root=root, size=size, val_share=0)


@functools.cache
def _code() -> str:
    """A hash of the package `zero_cost`: scores of other code are not the same scores."""
    folder = Path(zero_cost.__file__).parent
    content = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return content.hexdigest()[:16]
