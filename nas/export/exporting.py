"""Exports of networks: written, verified, and only then put in their place."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nas.export.card import Card
from nas.export.cases import input_names, on_graphs, plain_copy
from nas.export.program import check_onnx, save_onnx, save_program
from nas.export.verify import Verification, verify
from search_spaces.common.errors import UserError
from search_spaces.common.files import atomic_write
from search_spaces.common.names import nearest

SUFFIXES = (".py", ".pt2", ".onnx")
CLASS, LOADER = "Network", "load_network"


@dataclass(frozen=True)
class Exported:
    """files: what was written, the network first. params: how many it has. verified: how it was checked."""

    files: tuple[Path, ...]
    params: int
    verified: Verification


def check_target(to: Path, *, weights: bool = False, card: bool = True, force: bool = False) -> None:
    """Whether an export can be written to `to`, before anything is computed. Errors: UserError."""
    if to.suffix not in SUFFIXES:
        close = nearest(to.suffix, SUFFIXES)
        raise UserError(
            str(to), f"a file that ends in {', '.join(SUFFIXES)}", str(to.with_suffix(close)) if close else None
        )
    if not to.parent.is_dir():
        folder = to.parent.absolute()
        names = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        close = nearest(folder.name, names)
        raise UserError(str(to.parent), "a folder that exists", str(to.parent.with_name(close)) if close else None)
    if to.suffix == ".py" and not to.stem.isidentifier():
        raise UserError(to.name, "a name that Python can import", f"{_identifier(to.stem)}.py")
    if to.suffix == ".onnx":
        check_onnx()
    suffixes = [to.suffix] + [".safetensors"] * (weights and to.suffix == ".py") + [".md"] * card
    for file in (to.with_suffix(suffix) for suffix in suffixes):
        if file.is_dir():
            raise UserError(str(file), "a file, not a folder")
        if file.exists() and not force:
            raise UserError(str(file), "a file that does not exist (--force replaces it)")


def export_model(
    model: nn.Module,
    to: Path,
    *,
    example: tuple[Tensor, ...],
    card: Card | None = None,
    weights: bool = False,
    force: bool = False,
) -> Exported:
    """Write `model` to `to` as something that needs nasforge no more, and prove it in another process.

    .py: readable source that needs torch; with `weights` also `<stem>.safetensors` and a function `load_network` that
    reads it. .pt2: a program of torch.export; .onnx: for any ONNX runtime (extra `onnx`); both hold the weights, in
    evaluation mode and float32, and take any batch size. card: written as `<stem>.md`.
    example: inputs of the model with a batch dimension, or (x, edge_index); their numbers do not matter. The model
    stays as it is. Errors: UserError for a target that cannot be written, an unknown suffix and a missing extra;
    RunError where the result differs from the model: nothing is left behind then.
    """
    check_target(to, weights=weights, card=card is not None, force=force)
    params = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory(prefix="nasforge-export-") as name:
        draft = Path(name) / to.name
        loader = None
        if to.suffix == ".py":
            loader = LOADER if weights else None
            _save_source(model, draft, example, card, weights)
        else:
            {".pt2": save_program, ".onnx": save_onnx}[to.suffix](model, draft, example)
        verified = verify(draft, model, example, class_name=CLASS, loader=loader)
        files = [draft, *sorted(p for p in Path(name).iterdir() if p.is_file() and p != draft)]
        if card is not None:
            about = dataclasses.replace(card, params=params if card.params is None else card.params)
            text = about.markdown([p.name for p in files], verified, input_names(model, example))
            files.append(draft.with_suffix(".md"))
            files[-1].write_text(text, encoding="utf-8")
        return Exported(_move(files, to.parent), params, verified)


def _save_source(model: nn.Module, path: Path, example: Sequence[Tensor], card: Card | None, weights: bool) -> None:
    from nas.export.source import network_source

    shape: dict[str, Any] = {} if on_graphs(example) else {"example": tuple(example[0].shape[1:])}
    text = network_source(model, class_name=CLASS, title=card.title if card else None, **shape)
    if weights:
        from safetensors.torch import save_file

        file = path.with_suffix(".safetensors")
        state = {key: value.detach().contiguous() for key, value in plain_copy(model).state_dict().items()}
        save_file(state, file, metadata={"format": "pt"})
        text = text.rstrip("\n") + _LOADER.format(name=LOADER, class_name=CLASS, file=file.name)
    path.write_text(text, encoding="utf-8")


_LOADER = '''


def {name}() -> {class_name}:
    """The network with its trained weights, read from {file} beside this file (needs safetensors)."""
    from pathlib import Path

    from safetensors.torch import load_file

    network = {class_name}()
    network.load_state_dict(load_file(Path(__file__).with_name("{file}")))
    return network
'''


def _move(files: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """Copy all, or none; the first file gets its name last, so that where it is, the others are too."""
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(atomic_write(folder / file.name, "wb")).write(file.read_bytes())
    return tuple(folder / file.name for file in files)


def _identifier(stem: str) -> str:
    name = "".join(c if c.isalnum() else "_" for c in stem)
    return name if name.isidentifier() else f"network_{name}"
