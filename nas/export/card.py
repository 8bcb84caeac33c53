"""The model card: what an exported network is, where it comes from, how to use it; Markdown for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nas.export.verify import Verification

LICENCE = (
    "Written by nasforge, which is under the Apache License 2.0. The data that the network was searched or trained on"
    " have terms of their own; nasforge's THIRD_PARTY_DATA.md names those of the tables that it reads."
)
USE = {
    ".py": """from {module} import Network

network = Network()
logits = network({inputs})""",
    ".pt2": """import torch

network = torch.export.load("{file}").module()  # in evaluation mode
logits = network({inputs})""",
    ".onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{file}")
(logits,) = session.run(None, {{{feeds}}})  # float32 arrays of numpy{note}""",
}


@dataclass(frozen=True)
class Card:
    """What a model card says; what is None or empty is left out.

    arch: the architecture's text in `space`. norm, act: where they are not the space's own. scale: arguments of its
    `build`. params, macs: of the whole network, macs of one input of shape `input_shape`. trained: whether the weights
    are more than a random start. metrics: by name, with the units of the name (accuracies in percent); metrics_source:
    what measured them. preprocessing: what was done to the inputs in training. origin: run and trial. command: what
    wrote this export. training: the command that trains or trained it.
    """

    title: str
    space: str | None = None
    arch: str | None = None
    norm: str | None = None
    act: str | None = None
    scale: Mapping[str, object] = field(default_factory=dict)
    params: int | None = None
    macs: int | None = None
    input_shape: tuple[int, ...] = ()
    preprocessing: str | None = None
    trained: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    metrics_source: str | None = None
    data: str | None = None
    origin: str | None = None
    command: str | None = None
    training: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    licence: str = LICENCE

    def markdown(self, files: Sequence[str], verification: Verification | None, inputs: Sequence[str] = ("x",)) -> str:
        """The card as Markdown. files: names, the network's first. inputs: names of the arguments of `forward`."""
        state = "Trained network" if self.trained else "Untrained network (random weights)"
        where = f" of the space `{self.space}`" if self.space else ""
        sections = [f"# {self.title}\n\n{state}{where}."]
        sections.append(_list(self._facts()))
        sections += [f"## Use\n\n```python\n{_use(files, inputs)}\n```", self._input_line()]
        if self.metrics:
            measured = f"{self.metrics_source[:1].upper()}{self.metrics_source[1:]}.\n\n" if self.metrics_source else ""
            rows = {_metric(name): _number(value) for name, value in self.metrics.items()}
            sections.append("## Results\n\n" + measured + _list(rows))
        if self.training:
            lead = "The weights come from" if self.trained else "This trains it:"
            sections.append(f"## Training\n\n{lead}\n\n```\n{self.training}\n```")
        checked = (
            "Not verified." if verification is None else f"Verified when it was written: {verification.sentence()}."
        )
        sections.append(f"## Verification\n\n{checked}")
        sections.append("## Origin\n\n" + _list(self._origin()) if self._origin() else "")
        sections.append(f"## Licence\n\n{self.licence}")
        return "\n\n".join(section for section in sections if section) + "\n"

    def _facts(self) -> dict[str, str]:
        scale = ", ".join(f"{name} {value}" for name, value in self.scale.items())
        facts = {
            "Architecture": _code(self.arch),
            "Normalisation": _code(self.norm),
            "Activation": _code(self.act),
            "Scale": scale,
            "Parameters": "" if self.params is None else f"{self.params:,}",
            "Multiply-adds": "" if self.macs is None else f"{self.macs:,} per input of {_shape(self.input_shape)}",
            "Data": self.data or "",
        }
        return {name: value for name, value in facts.items() if value}

    def _input_line(self) -> str:
        shape = self.input_shape
        if not shape:
            return ""
        if len(shape) == 1:
            return f"`x` are node features [nodes, {shape[0]}], `edge_index` int64 edges [2, edges], from and to."
        line = f"Input: float32 [batch, {', '.join(map(str, shape))}]"
        return f"{line}; {self.preprocessing}." if self.preprocessing else f"{line}."

    def _origin(self) -> dict[str, str]:
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        facts = {"From": _code(self.origin), "Written by": _code(self.command), "Versions": versions}
        return {name: value for name, value in facts.items() if value}


def _list(rows: Mapping[str, str]) -> str:
    return "\n".join(f"- **{name}:** {value}" for name, value in rows.items())


def _code(text: str | None) -> str:
    return f"`{text}`" if text else ""


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _use(files: Sequence[str], inputs: Sequence[str]) -> str:
    file = files[0]
    stem, _, suffix = file.rpartition(".")
    weights = [name for name in files if name.endswith(".safetensors")]
    if weights:
        return f"from {stem} import load_network\n\nnetwork = load_network()  # reads {weights[0]} beside it\n" + (
            f"logits = network({', '.join(inputs)})"
        )
    feeds = ", ".join(f'"{name}": {name}' for name in inputs)
    note = ", edge_index of int64" if len(inputs) > 1 else ""
    return USE[f".{suffix}"].format(module=stem, file=file, inputs=", ".join(inputs), feeds=feeds, note=note)


UNITS = {"acc": "%", "error": "%", "ms": "ms", "mj": "mJ", "seconds": "s", "bytes": "bytes"}


def _metric(name: str) -> str:
    """`val_acc` -> `val acc (%)`."""
    words = name.split("_")
    unit = UNITS.get(words[-1])
    kept = words if unit in (None, "%") else words[:-1]
    return " ".join(kept) + (f" ({unit})" if unit else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1000 else f"{value:.5g}"
