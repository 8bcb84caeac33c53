"""Training-free scores of one network: shared passes against the floor, and against one proxy at a time.

    python -m benchmarks.speed.speed_zero_cost [--json] [--batch 64] [--channels 16] [--cells 5] [--repeats 3]
        [--sample 64]

On one core, on NAS-Bench-201 networks. Ratios, each of medians taken in turn in one run:

* all first-order proxies against the passes they cannot do without: one forward, one backward to the weights, one
  backward to the input at the same batch, one float64 forward of one sample for synflow;
* the whole set against straightforward code that runs one proxy at a time (tests/support/proxy_references.py);
* the kernel of nwot and the count of SWAP, given the signs, against their direct forms;
* forward-only proxies of `--sample` random architectures, one network each, against one shared network: without
  feature maps (codes, zen, synflow-forward) and with them (meco, which also counts the maps of dead branches), and the
  same one by one with channels innermost, which is how the shared network runs on a CPU. What deduplication saves
  among 1,000 architectures is counted beside it, and the two together are their product.

It also states the floor: multiply-adds over the machine's measured GEMM rate, of the first-order proxies and of the
forward passes of the shared network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nas.scoring import ScoringTask
from nas.scoring.batched import SharedNetwork
from nas.scoring.task import nothing_dead, representative
from search_spaces import load_space
from zero_cost import PROXIES, score
from zero_cost.captured import Probe
from zero_cost.network import Network
from zero_cost.probe import Observer

CELL = "|nor_conv_3x3~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_1x1~1|avg_pool_3x3~2|"
FIRST_ORDER = ("grad-norm", "snip", "plain", "fisher", "knas", "jacov", "epe-nas", "nwot", "swap", "l2-norm", "params")
PER_SAMPLE = 16
WITHOUT_MAPS = (
    "nwot",
    "swap",
    "linear-regions",
    "hash-redundancy",
    "hash-accuracy",
    "synflow-forward",
    "zen",
    "l2-norm",
)
WITH_MAPS = (*WITHOUT_MAPS, "meco", "meco-opt")
POPULATION = 1000


def in_turn(actions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each action, all of them once per repeat, after one round to warm up.

    Seconds of the processor, one thread: what else the machine does counts only by what it takes from its memory.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            begin = time.process_time()
            action()
            if repeat:
                times[name].append(time.process_time() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def bare_passes(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, double: torch.nn.Module) -> None:
    """What first-order proxies cannot do without."""
    leaf = inputs.clone().requires_grad_()
    logits = model(leaf)
    torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()), retain_graph=True)
    torch.autograd.grad(logits.sum(), [leaf])
    with torch.no_grad():
        double(torch.ones(1, *inputs.shape[1:], dtype=torch.float64))


def references() -> dict[str, Callable]:
    """{proxy: straightforward code for it}."""
    sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
    import proxy_references as reference

    names = ("grad-norm", "snip", "plain", "fisher", "knas", "jacov", "epe-nas", "nwot", "swap", "l2-norm", "synflow",
             "logsynflow", "grasp", "linear-regions", "meco", "meco-opt", "gradsign")  # fmt: skip
    found = {name: getattr(reference, name.replace("-", "_")) for name in names}
    found["zen"] = lambda m, x, y: reference.zen(m, x)
    found["ntk-condition"] = lambda m, x, y: reference.ntk(m, x, PER_SAMPLE)
    found["ntk-trace"] = found["ntk-condition"]
    for name in ("az-expressivity", "az-progressivity", "az-trainability"):
        found[name] = lambda m, x, y: reference.az_nas(m, x)
    found["zico"] = lambda m, x, y: reference.zico(m, [(x, y), (x.flip(0), y.flip(0))])
    return found


def codes(batch: int, repeats: int) -> dict[str, float]:
    """Seconds of nwot's kernel and SWAP's count over 20 layers of 16 x 16 x 16 units: here, and directly."""
    inputs = [torch.randn(batch, 16, 16, 16) for _ in range(20)]
    probe = Probe(Network(torch.nn.Identity(), "cpu", 0), [(inputs[0], None)], frozenset({"codes"}))

    def here() -> float:
        observer = Observer(probe, batch)
        for x in inputs:
            observer(F.relu, (x,), {})
        probe.captured.codes = observer.result(inputs[0])
        return float(PROXIES["nwot"].compute(probe.captured)) + float(PROXIES["swap"].compute(probe.captured))  # type: ignore[arg-type]

    def nwot_direct() -> float:
        kernel = torch.zeros(batch, batch)
        for x in inputs:
            c = (x > 0).flatten(1).float()
            kernel += c @ c.T + (1 - c) @ (1 - c).T
        return float(torch.linalg.slogdet(kernel.double())[1])

    def swap_direct() -> int:
        return len(torch.unique(torch.cat([(x[:PER_SAMPLE] > 0).flatten(1).T for x in inputs]), dim=0))

    assert abs(here() - nwot_direct() - swap_direct()) < 1e-6 * abs(here())
    actions = {"codes, here": here, "nwot, directly": nwot_direct, "swap, directly": swap_direct}
    return in_turn(actions, repeats)


def gemm_rate() -> float:
    """Multiply-adds per second of a 1024 x 1024 x 1024 product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 1024**3 / in_turn({"gemm": lambda: a @ b}, 7)["gemm"]


class Noise(ScoringTask):
    """N(0, 1) images of CIFAR's shape; `layout` is their memory format."""

    layout = torch.contiguous_format

    def opened(self) -> Any:
        return SimpleNamespace(shape=(3, 32, 32), num_classes=10)

    def batch(self, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(self.batch_size, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (self.batch_size,), generator=generator)
        return [(images.contiguous(memory_format=self.layout), labels)]


class NoiseChannelsLast(Noise):
    layout = torch.channels_last


def batching(batch: int, channels: int, cells: int, sample: int) -> dict[str, Any]:
    """Seconds per architecture of forward-only proxies, one by one and on one shared network."""
    space, rng = load_space("nas-bench-201"), np.random.default_rng(0)
    population = [space.sample(rng) for _ in range(POPULATION)]
    drawn = population[:sample]
    settings: dict[str, Any] = {"batch_size": batch, "network": {"channels": channels, "cells_per_stage": cells}}
    plain, last = Noise("nas-bench-201", **settings), NoiseChannelsLast("nas-bench-201", **settings)
    shared = SharedNetwork(plain, 0)
    shared.score(drawn[:2], WITH_MAPS)  # warm
    seconds: dict[str, float] = {}
    for title, names in (("without maps", WITHOUT_MAPS), ("with maps", WITH_MAPS)):
        times: dict[str, float] = {"one by one": 0.0, "channels last": 0.0, "shared": 0.0}
        for begin in range(0, sample, 32):  # in turn
            part = drawn[begin : begin + 32]
            actions: dict[str, Callable[[], object]] = {
                "one by one": lambda part=part, names=names: [plain.score(a, 0, names) for a in part],  # type: ignore[misc]
                "channels last": lambda part=part, names=names: [last.score(a, 0, names) for a in part],  # type: ignore[misc]
                "shared": lambda part=part, names=names: shared.score(part, names),  # type: ignore[misc]
            }
            for name, action in actions.items():
                start = time.process_time()
                action()
                times[name] += time.process_time() - start
        seconds |= {f"{name}, {title}": spent / sample for name, spent in times.items()}
    standing = [representative(space, "nas-bench-201", arch) for arch in population]
    by_calls = {
        found if nothing_dead(space, arch, found) else arch for arch, found in zip(population, standing, strict=True)
    }
    dedup = POPULATION / len(by_calls)
    ratios = {title: seconds[f"one by one, {title}"] / seconds[f"shared, {title}"] for title in TITLES}
    layout = {title: seconds[f"channels last, {title}"] / seconds[f"shared, {title}"] for title in TITLES}
    macs = statistics.mean(space.cost(arch, channels=channels, cells_per_stage=cells)["live_macs"] for arch in drawn)
    return {
        "one_by_one_over_shared_without_maps": ratios[TITLES[0]],
        "one_by_one_over_shared_with_maps": ratios[TITLES[1]],
        "channels_last_one_by_one_over_shared_without_maps": layout[TITLES[0]],
        "channels_last_one_by_one_over_shared_with_maps": layout[TITLES[1]],
        "architectures_over_networks_by_live_calls": dedup,
        "architectures_over_networks_by_function": POPULATION / len(set(standing)),
        "shared_and_deduplicated_without_maps": ratios[TITLES[0]] * dedup,
        "shared_fraction_of_floor": (1 + 2 * PER_SAMPLE / batch) * batch * macs / gemm_rate()
        / seconds[f"shared, {TITLES[0]}"],
        "seconds": seconds,
    }  # fmt: skip


TITLES = ("without maps", "with maps")


def measure(batch: int, channels: int, cells: int, repeats: int, sample: int) -> dict[str, object]:
    """All the ratios; seconds by name beside them."""
    space = load_space("nas-bench-201")
    torch.manual_seed(0)
    model = space.build(space.decode(CELL), channels=channels, cells_per_stage=cells).train()
    double = space.build(space.decode(CELL), channels=channels, cells_per_stage=cells).double().eval()
    inputs, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    one, two = (inputs, labels), [(inputs, labels), (inputs.flip(0), labels.flip(0))]
    first = in_turn(
        {
            "bare passes": lambda: bare_passes(model, inputs, labels, double),
            "first order": lambda: score(model, one, [*FIRST_ORDER, "synflow-forward"]),
        },
        repeats,
    )
    by_hand = references()
    set_names = [*by_hand, "params", "macs", "live-macs"]
    together = in_turn(
        {
            "whole set": lambda: score(model, two, set_names),
            "one at a time": lambda: [call(model, inputs, labels) for call in by_hand.values()],
        },
        1,
    )
    units = codes(batch, repeats)
    many = batching(batch, channels, cells, sample)
    macs = space.cost(space.decode(CELL), channels=channels, cells_per_stage=cells)["macs"]
    floor = 4 * batch * macs / gemm_rate()  # a forward, two thirds of a training step backward, one input backward
    return {
        "first_order_over_bare_passes": first["first order"] / first["bare passes"],
        "one_at_a_time_over_whole_set": together["one at a time"] / together["whole set"],
        "direct_codes_over_ours": (units["nwot, directly"] + units["swap, directly"]) / units["codes, here"],
        **{name: value for name, value in many.items() if name != "seconds"},
        "floor_seconds": floor,
        "fraction_of_floor": floor / first["first order"],
        "proxies_in_the_set": len(set_names),
        "seconds": {**first, **together, **units, **many["seconds"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    for name, default in (("batch", 64), ("channels", 16), ("cells", 5), ("repeats", 3), ("sample", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.batch, options.channels, options.cells, options.repeats, options.sample)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            for inner, seconds in value.items():
                print(f"  {inner:<28} {1000 * seconds:10.1f} ms")
        else:
            print(f"{name:<52} {value:.3g}")


if __name__ == "__main__":
    main()
