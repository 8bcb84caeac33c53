"""Training-free scores of one network: shared passes against the floor, and against one proxy at a time.

    python -m benchmarks.speed.speed_zero_cost [--json] [--batch 64] [--channels 16] [--cells 5] [--repeats 3]

On one core, on a NAS-Bench-201 network. Three ratios, each of medians taken in turn in one run:

* all first-order proxies against the passes they cannot do without: one forward, one backward to the weights, one
  backward to the input at the same batch, one float64 forward of one sample for synflow;
* the whole set against straightforward code that runs one proxy at a time (tests/support/proxy_references.py);
* the kernel of nwot and the count of SWAP, given the signs, against their direct forms.

It also states the floor: multiply-adds over the machine's measured GEMM rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from search_spaces import load_space
from zero_cost import PROXIES, score
from zero_cost.captured import Probe
from zero_cost.network import Network
from zero_cost.probe import Observer

CELL = "|nor_conv_3x3~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_1x1~1|avg_pool_3x3~2|"
FIRST_ORDER = ("grad-norm", "snip", "plain", "fisher", "knas", "jacov", "epe-nas", "nwot", "swap", "l2-norm", "params")
PER_SAMPLE = 16


def in_turn(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each action, all of them once per repeat, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            if repeat:
                times[name].append(time.perf_counter() - begin)
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


def measure(batch: int, channels: int, cells: int, repeats: int) -> dict[str, object]:
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
    macs = space.cost(space.decode(CELL), channels=channels, cells_per_stage=cells)["macs"]
    floor = 4 * batch * macs / gemm_rate()  # a forward, two thirds of a training step backward, one input backward
    return {
        "first_order_over_bare_passes": first["first order"] / first["bare passes"],
        "one_at_a_time_over_whole_set": together["one at a time"] / together["whole set"],
        "direct_codes_over_ours": (units["nwot, directly"] + units["swap, directly"]) / units["codes, here"],
        "floor_seconds": floor,
        "fraction_of_floor": floor / first["first order"],
        "proxies_in_the_set": len(set_names),
        "seconds": {**first, **together, **units},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    for name, default in (("batch", 64), ("channels", 16), ("cells", 5), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.batch, options.channels, options.cells, options.repeats)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            for inner, seconds in value.items():
                print(f"  {inner:<20} {1000 * seconds:10.1f} ms")
        else:
            print(f"{name:<32} {value:.3g}")


if __name__ == "__main__":
    main()
