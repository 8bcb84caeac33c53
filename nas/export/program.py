"""Networks as programs: torch.export's .pt2 and ONNX, for evaluation, with any batch size (any graph)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.export.cases import input_names, like, on_graphs, plain_copy
from search_spaces.common.errors import RunError, UserError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def save_program(model: nn.Module, path: Path, example: Sequence[Tensor]) -> None:
    """The model in evaluation mode as a program of torch.export; `torch.export.load(path).module()` gives it back.

    example: its inputs, [N, ...] each, or (x [nodes, features], edge_index [2, edges]); N, nodes and edges stay free.
    Errors: RunError for a model that torch.export cannot follow.
    """
    twin = plain_copy(model)
    with _quiet():
        try:
            program = torch.export.export(twin, _inputs(example), dynamic_shapes=_dynamic_shapes(example))
        except Exception as error:  # the tracer lets anything through
            raise _failed(error, "torch.export") from error
        torch.export.save(program, path)


def save_onnx(model: nn.Module, path: Path, example: Sequence[Tensor]) -> None:
    """The model in evaluation mode as an ONNX file, its inputs named as in `forward`, its output `output`.

    example: see `save_program`. Errors: UserError without the packages of the extra `onnx`, RunError for a model that
    has no ONNX form.
    """
    check_onnx()
    twin = plain_copy(model)
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                twin,
                _inputs(example),
                input_names=input_names(twin, example),
                output_names=["output"],
                dynamic_shapes=_dynamic_shapes(example),
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise _failed(error, "torch.onnx") from error
        program.save(str(path))


def check_onnx() -> None:
    """Errors: UserError without the packages of the extra `onnx`."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(".onnx", f"the package {missing[0]}, which is not installed: pip install 'nasforge[onnx]'")


def _inputs(example: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # Two samples: the tracer takes a dimension of one for a constant.
    return like(example, 2, torch.Generator().manual_seed(0))


def _dynamic_shapes(example: Sequence[Tensor]) -> tuple[dict[int, Any], ...]:
    if on_graphs(example):
        # A graph has a node: GAT asks whether its edges and self-loops are none, which the tracer has to know.
        return {0: torch.export.Dim("nodes", min=1)}, {1: torch.export.Dim("edges")}
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in example)


def _failed(error: BaseException, what: str) -> RunError:
    """The first line of the innermost cause: what is around it says how exporters work, not what is wrong."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reasons = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return RunError(f"{what} cannot take this model: {reasons[0] if reasons else type(cause).__name__}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on packages that are not installed and on their own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
