"""Runs an export where the toolkit cannot be imported: `python -I isolated.py FOLDER`.

FOLDER/request.json says what to run, FOLDER/given.safetensors holds the inputs; the answers are written beside them as
found.safetensors and found.json. `nas.export.verify` starts it, and imports `observe` to look at the original in the
same way. Nothing of the toolkit is imported here, and torch only for what needs it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Refusal:
    """An import hook that knows nothing of some packages."""

    def __init__(self, names: list[str]):
        self.names = frozenset(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"it imports {name}, which an export has to do without", name=name)


def observe(module: Any, cases: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a torch module answers, by name: outputs, and where a case asks for them gradients and later statistics.

    A case has `inputs` (names), `mode` (train, eval, or None: as it is) and `gradients` (of the sum of the outputs
    times `<case>/weights`). given: `<case>/<input>`.
    """
    import torch

    found = {}
    for name, case in cases.items():
        if case["mode"]:
            module.train(case["mode"] == "train")
        inputs = {key: given[f"{name}/{key}"].clone() for key in case["inputs"]}
        with torch.set_grad_enabled(case["gradients"]):
            if case["gradients"]:
                for value in inputs.values():
                    value.requires_grad_(value.is_floating_point())
            out = module(*inputs.values())
        found[f"{name}/output"] = out.detach()
        if case["gradients"]:
            named = [*inputs.items(), *module.named_parameters()]
            asked = {key: value for key, value in named if value.requires_grad}
            loss = (out * given[f"{name}/weights"]).sum()
            gradients = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
            for (key, value), gradient in zip(asked.items(), gradients, strict=True):
                found[f"{name}/gradient of {key}"] = torch.zeros_like(value) if gradient is None else gradient
        if case["mode"] == "train":
            found |= {f"{name}/{key} after a step": value.clone() for key, value in module.named_buffers()}
    return found


def layout(state: Mapping[str, Any]) -> list[list[Any]]:
    """[key, shape, dtype] of every tensor of a state dict, in order."""
    return [[key, list(value.shape), str(value.dtype)] for key, value in state.items()]


def _run_source(request: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    spec: Any = importlib.util.spec_from_file_location("exported_network", request["file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    network = getattr(module, request["class"])()
    answer = {"runtime": f"torch {torch.__version__}", "state": layout(network.state_dict())}
    if answer["state"] != request["state"]:
        return {}, answer  # weights of another network cannot be loaded; the answer says why
    if request["loader"]:
        network = getattr(module, request["loader"])()
    else:
        from safetensors.torch import load_file

        network.load_state_dict(load_file(request["weights"]), strict=True)
    found = {f"state/{key}": value.clone() for key, value in network.state_dict().items()}
    return found | observe(network, request["cases"], given), answer


def _run_program(request: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    program = torch.export.load(request["file"])
    answer = {"runtime": f"torch {torch.__version__}", "state": layout(program.state_dict)}
    found = {f"state/{key}": value.detach().clone() for key, value in program.state_dict.items()}
    return found | observe(program.module(), request["cases"], given), answer


def _run_onnx(request: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    session = onnxruntime.InferenceSession(request["file"], options, providers=["CPUExecutionProvider"])
    wanted = [entry.name for entry in session.get_inputs()]  # an input that the model ignores may be gone
    found = {}
    for name, case in request["cases"].items():
        feed = {key: given[f"{name}/{key}"] for key in case["inputs"] if key in wanted}
        found[f"{name}/output"] = session.run(None, feed)[0]
    return found, {"runtime": f"onnxruntime {onnxruntime.__version__}"}


def main(folder: Path) -> None:
    """Answer the request in `folder`."""
    request = json.loads((folder / "request.json").read_text())
    sys.path.extend(request["path"])
    sys.meta_path.insert(0, Refusal(request["refused"]))
    if request["kind"] == "onnx":
        from safetensors import numpy as tensors

        found, answer = _run_onnx(request, tensors.load_file(folder / "given.safetensors"))
        tensors.save_file(found, folder / "found.safetensors")
    else:
        import torch
        from safetensors import torch as torch_tensors

        torch.set_num_threads(request["threads"])
        run = _run_source if request["kind"] == "py" else _run_program
        found, answer = run(request, torch_tensors.load_file(folder / "given.safetensors"))
        found = {name: value.contiguous() for name, value in found.items()}
        torch_tensors.save_file(found, folder / "found.safetensors")
    (folder / "found.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
