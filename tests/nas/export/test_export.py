"""Exports of every space; targets that stay as they were when something goes wrong."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nas.export import exporting
from nas.export.card import Card
from nas.export.exporting import check_target, export_model
from nas.export.program import _quiet, save_onnx
from search_spaces.common.errors import RunError, UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer
from search_spaces.registry import load_space

IMAGE, GRAPH = (torch.zeros(2, 3, 8, 8),), (torch.zeros(4, 6), torch.zeros(2, 8, dtype=torch.long))
SMALL = {
    "nas-bench-101": {"channels": 4, "cells_per_stage": 1},
    "nas-bench-201": {"channels": 4, "cells_per_stage": 1},
    "nats-size": {"stem_stride": 2},
    "nas-bench-macro": {"channels": 2},
    "nas-bench-graph": {"in_features": 6, "num_classes": 7, "hidden": 4},
    "darts": {"channels": 4, "layers": 3},
}
ALWAYS = {("nas-bench-201", ".pt2"), ("nas-bench-101", ".onnx"), ("nas-bench-graph", ".onnx")}
SEEDS = {"nas-bench-graph": 3}  # one with attention, whose self-loops depend on the data
PAIRS = [
    pytest.param(space, suffix, marks=[] if (space, suffix) in ALWAYS else pytest.mark.slow)
    for space in SMALL
    for suffix in (".pt2", ".onnx")
]


def network(name: str, seed: int = 0, **net) -> nn.Module:
    space = load_space(name)
    torch.manual_seed(seed)
    return space.build(space.sample(np.random.default_rng(seed)), **SMALL[name], **net)


def with_searched_layers() -> nn.Module:
    """EvoNorm with and without batch statistics in turn, which are not as they begin."""
    graphs = itertools.cycle([layer("evonorm-s0"), layer("evonorm-b0")])
    model = network("nas-bench-201", norm=lambda c: GraphLayer(next(graphs), c), act=lambda c: nn.Identity())
    for value in model.state_dict().values():
        value.uniform_(0.5, 2) if value.min() == value.max() else value
    return model


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), nn.Dropout(0.5))


@pytest.mark.parametrize(("name", "suffix"), PAIRS)
def test_every_space(name, suffix, tmp_path, importable, capfd):
    if suffix == ".onnx":
        importable("onnxruntime")
    example = GRAPH if "graph" in name else IMAGE
    model = with_searched_layers() if name == "nas-bench-201" else network(name, SEEDS.get(name, 0))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    to = tmp_path / f"net{suffix}"
    done = export_model(model, to, example=example, card=Card("a network"))
    assert [path.name for path in done.files] == [f"net{suffix}", "net.md"]
    assert done.params == sum(p.numel() for p in model.parameters())
    assert 0 <= done.verified.output_error <= 1e-5
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.md", f"net{suffix}"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".py", ".pt2", ".onnx"])
@pytest.mark.parametrize("name", SMALL)
def test_further_architectures(name, suffix, tmp_path):
    example = GRAPH if "graph" in name else IMAGE
    for seed in range(1, 4):
        export_model(network(name, seed), tmp_path / f"net_{seed}{suffix}", example=example)
        export_model(network(name, seed).double(), tmp_path / f"double_{seed}{suffix}", example=example)


# -- targets -------------------------------------------------------------------------------------------------------


def test_targets_are_checked_first(tmp_path):
    (tmp_path / "old.pt2").write_text("old")
    (tmp_path / "card.md").write_text("old")
    (tmp_path / "weights.safetensors").write_text("old")
    (tmp_path / "folder.pt2").mkdir()
    suggested = {
        "net.pt": "net.pt2",
        "net.onx": "net.onnx",
        "net": None,
        "my-net.py": "my_net.py",
        "2.py": "network_2.py",
        "old.pt2": None,
        "card.onnx": None,
        "weights.py": None,
        "folder.pt2": None,
        "nowhere/net.py": None,
    }
    for name, suggestion in suggested.items():
        with pytest.raises(UserError) as caught:
            check_target(tmp_path / name, weights=True)
        found = caught.value.suggestion
        assert (None if found is None else Path(found).name) == suggestion, name
    check_target(tmp_path / "old.pt2", force=True)
    check_target(tmp_path / "card.pt2", card=False)
    check_target(tmp_path / "weights.py")
    with pytest.raises(UserError, match="a file, not a folder"):
        check_target(tmp_path / "folder.pt2", force=True)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="did you mean '.*/models'"):
        check_target(tmp_path / "model" / "net.py")


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    from nas.export import program

    find = program.importlib.util.find_spec
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else find(n, *a))
    with pytest.raises(UserError, match=r"pip install 'nasforge\[onnx\]'"):
        check_target(tmp_path / "net.onnx")


def test_a_failed_verification_leaves_everything_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "net.pt2").write_text("old")

    def save(model, path, example):
        path.write_text("no program")

    monkeypatch.setattr(exporting, "save_program", save)
    with pytest.raises(RunError, match="does not run on its own"):
        export_model(small(), tmp_path / "net.pt2", example=IMAGE, card=Card("x"), force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "old"


def test_all_files_or_none(tmp_path, monkeypatch):
    source = tmp_path / "draft"
    source.mkdir()
    for name in ("net.py", "net.safetensors", "net.md"):
        (source / name).write_text(name)
    target = tmp_path / "target"
    target.mkdir()
    (target / "net.md").write_text("old")
    files = [source / name for name in ("net.py", "net.safetensors", "gone.md")]
    with pytest.raises(RunError, match="gone.md could not be written"):  # the last cannot be read when two are written
        exporting._move(files, target)
    assert [p.name for p in target.iterdir()] == ["net.md"]
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    found = exporting._move([source / name for name in ("net.py", "net.safetensors", "net.md")], target)
    assert order == ["net.md", "net.safetensors", "net.py"]  # where the network is, the others are
    assert [path.read_text() for path in found] == ["net.py", "net.safetensors", "net.md"]


KILLED = """
import sys, time, torch
from pathlib import Path
from nas.export import exporting

def verify(path, *arguments, **more):
    assert path.exists()
    print("verifying", flush=True)
    time.sleep(60)

exporting.verify = verify
exporting.save_program = lambda model, path, example: path.write_text("new")
exporting.export_model(torch.nn.Linear(2, 2), Path(sys.argv[1]), example=(torch.zeros(2, 2),), force=True)
"""


def test_a_killed_export_leaves_the_old_file(tmp_path):
    target = tmp_path / "out" / "net.pt2"
    target.parent.mkdir()
    target.write_text("old")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"verifying\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert [p.name for p in target.parent.iterdir()] == ["net.pt2"]
    assert target.read_text() == "old"


def test_a_model_that_cannot_be_followed(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x * float(x.sum()) if float(x.sum()) > 0 else x

    with pytest.raises(RunError, match="torch.export cannot take this model: "):
        export_model(Odd(), tmp_path / "net.pt2", example=IMAGE)
    assert not list(tmp_path.iterdir())


def test_terminals_stay_clean_and_logging_as_it_was(tmp_path, importable, capfd):
    import logging
    import warnings

    importable("onnxscript")
    level = logging.getLogger("torch.onnx").level
    save_onnx(small(), tmp_path / "net.onnx", IMAGE)
    with _quiet():
        print("noise")
        warnings.warn("noise", FutureWarning, stacklevel=1)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level
