"""Verification: an export runs in a process that cannot import the toolkit, and has to answer as its original does."""

from __future__ import annotations

import ast
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.export import isolated
from nas.export.cases import make_cases, plain_copy
from search_spaces.common.errors import RunError

TOOLKIT = ("search_spaces", "zero_cost", "benchmarks", "predictors", "kernels", "nas")
REFUSED = {"py": (*TOOLKIT, "torch_geometric"), "pt2": (*TOOLKIT, "torch_geometric"), "onnx": (*TOOLKIT, "torch")}
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # of a tensor's largest number
# Where the model's own rounding is coarser (float32 against float64), so many times that, but never above the limit.
ROUNDINGS, LIMIT = 4, 1e-3
SMALL = 1e-2  # a gradient is compared on the scale of its own or of this share of the largest of all gradients
SECONDS = 1800  # until a process that hangs is given up


@dataclass(frozen=True)
class Verification:
    """What was compared and how far apart it was: largest differences, as shares of the largest number of a tensor.

    runtime: what ran the export. cases: on what. gradient_error: of gradients and of statistics after a training
    step; None where the export is for evaluation only.
    """

    runtime: str
    cases: tuple[str, ...]
    output_error: float
    gradient_error: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "cases": list(self.cases)}

    def sentence(self) -> str:
        """One line for people."""
        parts = [_said("outputs", self.output_error)]
        if self.gradient_error is not None:
            parts.append(_said("gradients and statistics after a step", self.gradient_error))
        return f"{'; '.join(parts)} (run by {self.runtime} in a process without nasforge, {', '.join(self.cases)})"


def _said(what: str, error: float) -> str:
    return f"{what} equal the original's" if error == 0 else f"{what} differ by at most {error:.1g} of the largest"


def verify(
    path: Path,
    model: nn.Module,
    example: Sequence[Tensor],
    *,
    class_name: str = "Network",
    loader: str | None = None,
) -> Verification:
    """Run the export at `path` (.py, .pt2 or .onnx) elsewhere and compare it with `model`.

    example: inputs as the model takes them; their numbers do not matter, their shapes do. class_name, loader: of a .py
    file, the class and, if it has one, the function that returns it with its weights. A .py file may import torch and
    the standard library only (safetensors too with a loader); its state dict, gradients and statistics after a training
    step are compared too, of a .pt2 file its weights. Errors: RunError that names the tensor and the difference.
    """
    kind = path.suffix[1:]
    twin = plain_copy(model)
    if kind == "py":
        _check_imports(path, ("torch", "safetensors") if loader else ("torch",))
    cases, given = make_cases(twin, example, source=kind == "py")
    state = {key: value.clone() for key, value in twin.state_dict().items()}
    unchanged = copy.deepcopy(twin)  # a training step changes the twin's statistics
    expected = isolated.observe(twin, cases, given)
    if kind == "pt2" or loader:
        expected |= {f"state/{key}": value for key, value in state.items()}
    for name, value in expected.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise RunError(f"the model itself gives numbers that are not finite ({name}); there is nothing to compare")
    request: dict[str, Any] = {
        "file": str(path.absolute()),
        "kind": kind,
        "class": class_name,
        "loader": loader,
        "state": isolated.layout(state),
        "cases": cases,
        "refused": REFUSED[kind],
        "path": [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p],
        "threads": torch.get_num_threads(),
    }
    found, answer = _run(path, request, given, state)
    if kind == "py":
        _compare_layouts(path, request["state"], answer["state"])
    if kind == "pt2":  # torch.export has parameters before buffers
        _compare_layouts(path, sorted(request["state"]), sorted(answer["state"]))
    output_error, gradient_error = _compare(path, expected, found, lambda: _in_float64(unchanged, cases, given))
    return Verification(answer["runtime"], tuple(cases), output_error, gradient_error if kind == "py" else None)


def _in_float64(twin: nn.Module, cases: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The answers without the rounding of float32; none for a model that knows float32 only."""
    double = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    try:
        return isolated.observe(twin.double(), cases, double)
    except RuntimeError:  # types that do not fit
        return {}


def _check_imports(path: Path, allowed: Sequence[str]) -> None:
    """The import hook sees what is imported on the way; this sees all that is written."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise RunError(f"{path.name} is not valid Python: {error.msg} in line {error.lineno}") from None
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            package = name.partition(".")[0]
            if package not in sys.stdlib_module_names and package not in allowed:
                raise RunError(f"{path.name} imports {name}; it may need {' and '.join(allowed)} only")


def _run(
    path: Path, request: dict[str, Any], given: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="nasforge-verify-") as name:
        folder = Path(name)
        if request["kind"] == "py" and not request["loader"]:
            request["weights"] = str(folder / "state.safetensors")
            save_file({key: value.contiguous() for key, value in state.items()}, request["weights"])
        save_file({key: value.contiguous() for key, value in given.items()}, folder / "given.safetensors")
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-I", isolated.__file__, name]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        try:
            process = subprocess.run(
                command, cwd=name, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"{path.name} did not answer within {SECONDS} s when it was run on its own") from None
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
            raise RunError(f"{path.name} does not run on its own: {lines[-1]}")
        return load_file(folder / "found.safetensors"), json.loads((folder / "found.json").read_text())


def _compare_layouts(path: Path, expected: list[list[Any]], found: list[list[Any]]) -> None:
    names, others = [key for key, *_ in expected], [key for key, *_ in found]
    for title, extra in (("lacks", set(names) - set(others)), ("has an additional", set(others) - set(names))):
        if extra:
            raise RunError(f"{path.name} {title} tensor in its state dict: {sorted(extra)[0]} ({len(extra)} in all)")
    for (key, *tensor), (other_key, *other) in zip(expected, found, strict=True):
        if key != other_key:
            raise RunError(f"{path.name} has {other_key} in its state dict where the model has {key}")
        if tensor != other:
            raise RunError(f"{path.name} has {key} as {other[1]} {other[0]}, the model as {tensor[1]} {tensor[0]}")


def _compare(
    path: Path,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    make_exact: Callable[[], Mapping[str, Tensor]],
) -> tuple[float, float]:
    """(largest difference of outputs, of the rest) as a share of the largest number; RunError beyond the tolerance.

    make_exact: the answers in float64, asked for only where the tolerance is not kept.
    """
    exact: Mapping[str, Tensor] | None = None
    sizes = {name: float(value.abs().max()) for name, value in expected.items() if value.is_floating_point()}
    worst = {OUTPUT_TOLERANCE: 0.0, GRADIENT_TOLERANCE: 0.0}
    for name, value in expected.items():
        case, _, what = name.partition("/")
        label = f"{what} ({case})" if case != "state" else what
        other = found.get(name)
        if other is None or other.shape != value.shape:
            shape = "nothing" if other is None else f"shape {tuple(other.shape)}"
            raise RunError(f"{path.name} is not the model: {label} has shape {tuple(value.shape)}, found {shape}")
        if case == "state" or not value.is_floating_point():
            if not torch.equal(value, other):
                raise RunError(f"{path.name} is not the model: {label} has other values{_apart(value, other)}")
            continue
        tolerance = OUTPUT_TOLERANCE if what == "output" else GRADIENT_TOLERANCE
        scale = sizes[name]
        if what != "output":
            kind = what.partition(" ")[0] == "gradient"
            alike = [s for n, s in sizes.items() if n.startswith(f"{case}/") and ("/gradient of " in n) == kind]
            scale = max(scale, SMALL * max(alike))
        difference = float((value - other).abs().max())
        error = difference / scale if scale else difference
        allowed = tolerance
        if not error <= tolerance and scale:
            exact = make_exact() if exact is None else exact
            rounding = float((value - exact[name]).abs().max()) / scale if name in exact else 0.0
            allowed = max(tolerance, min(ROUNDINGS * rounding, LIMIT))
        if not error <= allowed:
            raise RunError(
                f"{path.name} is not the model: {label} differs by {difference:.3g} where the largest number is"
                f" {scale:.3g}; {allowed:.1g} of it is allowed"
            )
        worst[tolerance] = max(worst[tolerance], error)
    return worst[OUTPUT_TOLERANCE], worst[GRADIENT_TOLERANCE]


def _apart(value: Tensor, other: Tensor) -> str:
    return f" (by up to {float((value.double() - other.double()).abs().max()):.3g})"
