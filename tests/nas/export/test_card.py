"""The model card is for reading: what it says, and that nothing empty is said."""

from __future__ import annotations

import re

import pytest

from nas.export.card import Card
from nas.export.verify import Verification

CHECKED = Verification("onnxruntime 1.2.3", ("batch of 1", "batch of 3"), 3.2e-7)
FULL = Card(
    "A network",
    space="nas-bench-201",
    arch="|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|",
    norm="evonorm-s0",
    act="none",
    scale={"channels": 8},
    params=1234567,
    macs=7654321,
    input_shape=(3, 32, 32),
    preprocessing="pixels scaled to [0, 1]",
    trained=True,
    metrics={"val_acc": 91.25, "latency_ms": 1.5, "train_seconds": 120.0, "params": 1234567.0},
    metrics_source="measured at the end of the training",
    data="cifar10",
    origin="runs/a, trial 3",
    command="nas export runs/a:3 --to net.py",
    training="nas train runs/s:best --data cifar10",
    versions={"torch": "2.13.0"},
)


def sections(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, flags=re.M)


def test_a_full_card():
    text = FULL.markdown(["net.py", "net.safetensors"], CHECKED)
    assert text.startswith("# A network\n\nTrained network of the space `nas-bench-201`.\n")
    assert sections(text) == ["Use", "Results", "Training", "Verification", "Origin", "Licence"]
    for fact in (
        "- **Architecture:** `|nor_conv_3x3~0|",
        "- **Parameters:** 1,234,567\n",
        "- **Multiply-adds:** 7,654,321 per input of 3 x 32 x 32\n",
        "- **val acc (%):** 91.25\n",
        "- **latency (ms):** 1.5\n",
        "- **train (s):** 120\n",
        "- **params:** 1,234,567\n",
        "Input: float32 [batch, 3, 32, 32]; pixels scaled to [0, 1].\n",
        "Measured at the end of the training.\n",
        "outputs differ by at most 3e-07 of the largest (run by onnxruntime 1.2.3",
        "The weights come from\n\n```\nnas train runs/s:best --data cifar10\n```\n",
        "- **From:** `runs/a, trial 3`\n",
    ):
        assert fact in text
    assert "None" not in text
    assert not re.search(r"\n\n\n|[ \t]\n", text)


def test_an_empty_card_says_nothing_empty():
    text = Card("Net").markdown(["net.pt2"], None)
    assert sections(text) == ["Use", "Verification", "Licence"]
    assert "Untrained network (random weights).\n" in text
    assert "Not verified." in text
    assert "None" not in text
    assert not re.search(r"\n\n\n|``|[ \t]\n", text.replace("```", "~~~"))


def test_verification_is_told_plainly():
    same = Verification("torch 2", ("batch of 1", "training"), 0.0, 2e-6)
    assert same.sentence().startswith(
        "outputs equal the original's; gradients and statistics after a step differ by at most 2e-06 of the largest"
    )
    assert same.as_json() == {
        "runtime": "torch 2",
        "cases": ["batch of 1", "training"],
        "output_error": 0.0,
        "gradient_error": 2e-6,
    }


@pytest.mark.parametrize(
    ("files", "inputs", "expected"),
    [
        (["net.py"], ("x",), "from net import Network"),
        (["net.py", "net.safetensors"], ("x",), "from net import load_network"),
        (["net.pt2"], ("x", "edge_index"), "logits = network(x, edge_index)"),
        (["net.onnx"], ("x", "edge_index"), '{"x": x, "edge_index": edge_index}'),
    ],
)
def test_the_use_is_python(files, inputs, expected):
    code = re.findall(r"```python\n(.*?)```", Card("Net").markdown(files, CHECKED, inputs), flags=re.S)
    assert len(code) == 1
    compile(code[0], "card", "exec")
    assert expected in code[0]
