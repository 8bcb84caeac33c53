"""Runs generated kernels in Triton's interpreter and prints one JSON line per check, and before the checks of
each part its name; in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from generated_cases import DEGENERATE, LAYERS, SCHEDULES, Task, by_kernels, errors, graph_tasks, layer_tasks
from interpreting import prepare
from kernel_cases import Case, make_case

from kernels import runtime
from kernels.nodes import CONDITIONS, ELEMENTWISE, FULL, Unsupported
from kernels.program import Builder
from kernels.reference import execute
from search_spaces.common.errors import UserError
from search_spaces.layers import catalog
from search_spaces.layers.formula import parse_formula

IMAGES = ((2, 12, 7, 7), (3, 10, 4, 5), (1, 8, 3), (5, 24, 1, 1))


def report(name: str, error: float, bound: float) -> None:
    print(json.dumps({"name": name, "error": error, "bound": bound}), flush=True)


def holds(name: str, condition: bool) -> None:
    report(name, 0.0 if condition else 1.0, 0.5)


def check(task: Task, **options) -> bool:
    """Every output of a task; False where it does not have the schedule that is asked for."""
    try:
        found = by_kernels(task, runtime.run, **options)
    except Unsupported:
        if not options:
            raise
        return False
    for name, error, bound in errors(task, found):
        report(f"{task.name} {task.dtype} {options} {name}", error, bound)
    return True


def graphs(count: int, seed: int) -> None:
    for number, task in enumerate(graph_tasks(count, seed)):
        check(task)
        if number % 4 == 0:  # several tiles and programs where one would do
            check(task, tile=(16, 64)[number % 8 // 4])


def layers(full: bool) -> None:
    for number, task in enumerate(layer_tasks(IMAGES)):
        if not full and number % 4:  # every layer on one shape or more
            continue
        check(task)
        if full or number % 8 == 0:
            small = (8, 64)[number // 4 % 2] if full else 48
            check(replace(task, last=True), tile=small, schedule=SCHEDULES[number // 4 % 3])
    shapes = ((2, 8, 14, 14), (2, 12, 7, 7)) if full else ((2, 12, 5, 5),)
    for number, task in enumerate(layer_tasks(shapes, dtype=torch.bfloat16)):
        if full or number % 2:
            check(task)
    for number, task in enumerate(layer_tasks(shapes[-1:], dtype=torch.float16)):
        if full or not number % 2:
            check(replace(task, last=True))


def tokens(full: bool) -> None:
    """[B, positions, C]: statistics at each position, over positions, over the batch."""
    for formula in (
        "(x - mean[channel](x)) / std[channel](x)",
        "x * sigmoid(v1 * x) / std[channel-group](x)",
        "(x - mean[batch](x)) / std[batch](x)",
        "x / max(std[batch](x), v1 * x + std[channel](x))",
        "(x - mean[instance](x)) / std[group](x)",
        "tanh(x) * v1 + v0",
    ):
        graph = parse_formula(formula, groups=4)
        for shape in ((2, 7, 12), (1, 1, 8), (3, 33, 20))[: 3 if full else 2]:
            for tile in (None, 32):
                case = make_case(graph, shape, layout="tokens", training=True, seed=2)
                floor = DEGENERATE if shape[:2] == (1, 1) else 1e-6
                check(Task(f"{formula} {shape} {tile}", case, tolerance=LAYERS, floor=floor), tile=tile)


def schedules(full: bool) -> None:
    """Every schedule that a layer can have, on one and several tiles, gives the layer."""
    expected = {"evonorm-s0": "RLU", "bn-relu": "U", "evonorm-b0": "RU", "layer-norm": "RLU", "frn-tlu": "RLU"}
    for number, (name, kinds) in enumerate(expected.items()):
        graph = replace(catalog.layer(name), groups=3)
        for shape in ((2, 12, 49), (3, 6, 64)) if full else ((2, 6, 40),):
            case = make_case(graph, shape, layout="channels-first", training=True, seed=1)
            for last in (False, True) if full else (number % 2 == 1,):
                found = ""
                for kind in SCHEDULES:
                    used = [
                        check(Task(name, case, last=last, tolerance=LAYERS), schedule=kind, tile=t) for t in (None, 32)
                    ]
                    found += kind * any(used)
                holds(f"{name} has {kinds}: {found}", set(kinds) <= set(found))


def with_x(case: Case, x: torch.Tensor) -> Case:
    return replace(case, x=x.double())


def traps(full: bool) -> None:
    """Numbers that break careless kernels; compared with what eager float32 is off, and where it is finite."""
    generator = torch.Generator().manual_seed(7)
    names = ("batch-norm", "group-norm", "evonorm-b0", "layer-norm", "instance-norm", "rms-norm")
    for name in names if full else names[:3]:
        graph = replace(catalog.layer(name), groups=2)
        base = make_case(graph, (3, 4, 40), layout="channels-first", training=True, seed=1)
        noise = torch.randn(3, 4, 40, generator=generator)
        spike = noise.clone()
        spike[1, 2, 3] = 1e4
        inputs = {
            "mean 1e4": noise + 1e4,
            "mean 1e3 in one channel": noise + torch.tensor([0.0, 1e3, 0.0, -1e3])[:, None],
            "constant": torch.full((3, 4, 40), 3.25),
            "zeros": torch.zeros(3, 4, 40),
            "spike": spike,
            "tiny": noise * 1e-12,
            "a trend": noise + torch.arange(40) * 100.0,
        }
        for trap, x in inputs.items():
            for tile in (None, 16) if full or trap in ("mean 1e4", "spike") else (None,):
                check(Task(f"{name}, {trap}", with_x(base, x)), tile=tile)
    case = make_case(catalog.layer("group-norm", groups=2), (2, 4, 64), layout="channels-first", training=True, seed=1)
    check(Task("fp16 range", with_x(case, case.x * 2e4), dtype=torch.float16))
    moments()


def moments() -> None:
    """Mean and variance of 1e4 + noise: a difference of moments in float32 would be off by 8, ours by the spacing of
    float32 at 1e4 (1e-3) times the spread of the means that are merged."""
    noise = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(8))
    case = make_case(catalog.layer("batch-norm"), (3, 4, 40), layout="channels-first", training=True, seed=1)
    task = Task("batch-norm", with_x(case, noise + 1e4))
    channels = (noise + 1e4).double().transpose(0, 1).flatten(1)
    for tile in (None, 16):
        found = runtime.run(task.lowered.program, task.inputs(), tile=tile)
        report(f"mean {tile}", float((found["moment_0"] - channels.mean(1)).abs().max()), 2e-3)
        variance = channels.var(1, unbiased=case.graph.unbiased)
        report(f"variance {tile}", float((found["moment_1"] - variance).abs().max()), 5e-4)


def non_finite(full: bool) -> None:
    """Infinities and NaN arrive where eager has them."""
    names = ("bn-relu", "gn-silu", "evonorm-b0", "evonorm-s0", "relu", "layer-norm", "maxtanh-rms", "gelu")
    for name in names if full else names[:4]:
        graph = replace(catalog.layer(name), groups=2)
        case = make_case(graph, (3, 4, 20), layout="channels-first", training=True, seed=1)
        for value in (float("nan"), float("inf"), -float("inf")):
            x = case.x.clone()
            x[1, 2, 3] = value
            task = Task(name, with_x(case, x))
            eager = execute(task.lowered.program, task.inputs(), groups=task.groups)
            for tile in (None, 8) if full or value != value else (None,):
                found = runtime.run(task.lowered.program, task.inputs(), groups=task.groups, tile=tile)
                for output, want in eager.items():
                    same = torch.equal(found[output].isnan(), want.isnan())
                    same &= torch.equal(found[output].isposinf(), want.isposinf())
                    holds(
                        f"{name} {value} {tile} {output}", same & torch.equal(found[output].isneginf(), want.isneginf())
                    )


def inputs(full: bool) -> None:
    """Strides, types and bad input; results that share no memory; the same bits twice."""
    graph = replace(catalog.layer("gn-silu"), groups=3)
    case = make_case(graph, (4, 6, 10), layout="channels-first", training=True, seed=1)
    task = Task("gn-silu", case)
    given, derivative = task.inputs(), task.programs()
    wanted = runtime.run(derivative.forward, given, groups=3)
    again = runtime.run(derivative.forward, given, groups=3)
    holds("the same bits", all(torch.equal(wanted[name], again[name]) for name in wanted))
    x = given["x"]
    wide = torch.zeros(4, 6, 25)
    wide[:, :, 3:23:2] = x
    views = {
        "strided": wide[:, :, 3:23:2],
        "an offset": torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x),
        "a part of a batch": torch.stack([x, x], 1)[:, 0],
        "permuted": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    for name, view in views.items():
        found = runtime.run(derivative.forward, {**given, "x": view}, groups=3)
        holds(name, all(torch.allclose(found[k], wanted[k], rtol=1e-6, atol=1e-7) for k in wanted))
    expanded = torch.tensor(0.5).expand(4, 6, 10)
    saved = {**given, **wanted}
    dense = runtime.run(derivative.backward, {**saved, "dy": torch.full((4, 6, 10), 0.5)}, groups=3)
    for name, dy in {"expanded": expanded, "double": expanded.double(), "half": expanded.half()}.items():
        found = runtime.run(derivative.backward, {**saved, "dy": dy}, groups=3)
        holds(f"{name} dy", all(torch.equal(found[k], dense[k]) for k in dense))
    half = {k: v.bfloat16() if k in task.lowered.parameters else v for k, v in given.items()}
    rounded = {k: v.float() for k, v in half.items()}
    low, high = (runtime.run(derivative.forward, one, groups=3)["y"] for one in (half, rounded))
    holds("bfloat16 parameters", torch.equal(low, high))
    memory = [value.untyped_storage().data_ptr() for value in wanted.values()]
    holds("no shared memory", len(set(memory)) == len(memory))
    empty = runtime.run(derivative.forward, {**given, "x": torch.zeros(0, 6, 10)}, groups=3)
    holds("an empty batch", empty["y"].shape == (0, 6, 10))
    for name, changed, groups, error in (
        ("double", {"x": x.double()}, 3, Unsupported),
        ("integers", {"x": x.int()}, 3, Unsupported),
        ("complex", {"x": x.to(torch.complex64)}, 3, Unsupported),
        ("sparse", {"x": x.to_sparse()}, 3, UserError),
        ("rank", {"x": x[0]}, 3, UserError),
        ("channels", {"weight": torch.zeros(5)}, 3, UserError),
        ("groups", {}, 4, UserError),
    ):
        try:
            runtime.run(derivative.forward, {**given, **changed}, groups=groups)
            holds(f"{name} is refused", False)
        except error as refused:
            holds(f"{name} is refused: {refused}", True)
    try:
        runtime.run(derivative.forward, {k: v for k, v in given.items() if k != "weight"}, groups=3)
        holds("a missing input is refused", False)
    except UserError as refused:
        holds("a missing input is refused", "weight" in str(refused))


def operations(full: bool) -> None:
    """Every element-wise operation on ordinary and on extreme numbers, against torch's float32 or twice its error."""
    special = [0.0, -0.0, 1e-30, -1e-30, 1e-6, 0.1249, 0.1251, 20.0, 20.1, 87.0, -87.0, 104.0, -104.0, 1e30, -1e30]
    values = torch.tensor([*special, float("inf"), -float("inf"), float("nan")])
    line = torch.cat([values, torch.linspace(-9, 9, 182), torch.logspace(-9, 9, 56)])  # 256 numbers
    others = torch.cat([line.flip(0)[:100], line[100:200], torch.full((56,), 0.5)])
    x, dy = line.view(1, 1, -1), others.view(1, 1, -1)
    for op, arity in ELEMENTWISE.items():
        builder = Builder()
        names = [builder.input("x", FULL), builder.input("dy", FULL)]
        if op in CONDITIONS:
            node = builder("where", builder(op, *names), names[0], names[1])
        elif op == "where":
            node = builder("where", builder("lt", names[0], 0.5), names[0], names[1])
        else:
            node = builder(op, *names[:arity])
        program = builder.program({"y": builder.expand(node, FULL)})
        found = runtime.run(program, {"x": x, "dy": dy})["y"].double()
        rough, exact = (
            execute(program, {"x": x.to(t), "dy": dy.to(t)})["y"].double() for t in (torch.float32, torch.float64)
        )
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            holds(f"{op} {kind.__name__}", torch.equal(kind(found), kind(rough)))
        usable = rough.isfinite() & exact.isfinite() & (exact.abs() < 1e37)
        if op in ("sin", "cos"):  # float32 knows nothing of the phase of larger numbers
            usable &= x.abs() < 2**29
            holds(f"{op} is bounded", bool(found[found.isfinite()].abs().max() <= 1))
        off = (found - exact).abs()[usable]
        relative = 4e-7 * (1 + exact.abs().log().abs().nan_to_num(0, 0, 0) * (op == "pow"))  # by exp and log in float32
        absolute = 1e-7 * (op in ("tanh", "erf", "sin", "cos"))
        allowed = (2 * (rough - exact).abs() + relative * exact.abs() + absolute)[usable] + 1e-37
        report(op, float((off / allowed).max()), 1.0)


def main(parts: list[str]) -> None:
    """parts: names of functions, with `:full` for the slow tests' extent, or `graphs:COUNT:SEED`."""
    functions = {f.__name__: f for f in (layers, tokens, schedules, traps, non_finite, inputs, operations)}
    for part in parts:
        name, *arguments = part.split(":")
        prepare(sanitize=arguments == ["full"])
        print(json.dumps({"part": name}), flush=True)
        if name == "graphs":
            graphs(*map(int, arguments))
        else:
            functions[name](arguments == ["full"])


if __name__ == "__main__":
    main(sys.argv[1:])
