"""Verification has to pass what is right and to fail what is wrong, each time it runs in a process of its own."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nas.export import verify as verify_module
from nas.export.cases import _factor, like, make_cases, plain_copy
from nas.export.isolated import observe
from nas.export.program import save_onnx
from nas.export.verify import OUTPUT_TOLERANCE, verify
from search_spaces.common.errors import RunError, UserError
from search_spaces.registry import load_space

TEXT = '''"""A network for these tests."""

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))
'''
EXAMPLE = (torch.zeros(2, 3, 6, 6),)


def model(text: str = TEXT) -> nn.Module:
    space: dict = {"__name__": "written"}
    exec(text, space)
    torch.manual_seed(0)
    return space["Network"]()


def check(tmp_path, text: str, of: nn.Module | None = None):
    path = tmp_path / "net.py"
    path.write_text(text)
    return verify(path, model() if of is None else of, EXAMPLE)


def test_a_right_text_passes(tmp_path):
    found = check(tmp_path, TEXT)
    assert found.runtime == f"torch {torch.__version__}"
    assert found.cases == ("batch of 1", "batch of 3", "training")
    assert found.output_error <= 1e-6
    assert found.gradient_error is not None
    assert found.gradient_error <= 1e-5


WRONG = {
    "output": ("torch.relu(", "nn.functional.silu(", r"output \(batch of 1\)"),
    "gradient": ("self.head(x.", "self.head((x.detach() / 2 + x / 2).", r"gradient of x \(training\)"),
    "statistics": ("nn.BatchNorm2d(4)", "nn.BatchNorm2d(4, momentum=0.2)", "norm.running_mean after a step"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_text_fails(wrong):
    """What `verify` does, without the other process."""
    old, new, message = WRONG[wrong]
    assert old in TEXT
    right, other = plain_copy(model()), plain_copy(model(TEXT.replace(old, new, 1)))
    other.load_state_dict(right.state_dict())
    cases, given = make_cases(right, EXAMPLE, source=True)
    expected, found = observe(right, cases, given), observe(other, cases, given)
    with pytest.raises(RunError, match=message):
        verify_module._compare(verify_module.Path("net.py"), expected, found, dict)
    again = observe(plain_copy(model()), cases, given)
    assert verify_module._compare(verify_module.Path("net.py"), expected, again, dict) == (0, 0)


def test_the_toolkit_cannot_be_imported(tmp_path):
    text = TEXT.replace("super().__init__()", "super().__init__(); __import__('search_' + 'spaces')")
    with pytest.raises(RunError, match=r"net.py does not run on its own: .* imports search_spaces"):
        check(tmp_path, text)


IMPORTS = ["import search_spaces.space", "from nas.export import verify", "import numpy", "from . import other"]


@pytest.mark.parametrize("line", IMPORTS)
def test_an_import_beyond_torch_fails_wherever_it_stands(tmp_path, line):
    with pytest.raises(RunError, match="imports .*; it may need torch only"):
        check(tmp_path, f"{TEXT}\n    def unused(self):\n        {line}\n")


def test_no_python_fails(tmp_path):
    with pytest.raises(RunError, match="not valid Python.* in line 3"):
        check(tmp_path, TEXT.replace("import torch", "import torch as", 1))


def test_state_dicts_are_compared_in_order():
    layout = [["a", [2], "torch.float32"], ["b", [3], "torch.float32"]]
    path = verify_module.Path("net.py")
    verify_module._compare_layouts(path, layout, layout)
    others = {
        "lacks tensor in its state dict: b": layout[:1],
        "has an additional tensor in its state dict: c": [*layout, ["c", [], "torch.int64"]],
        "has b in its state dict where the model has a": layout[::-1],
        r"b as torch.float32 \[4\], the model as torch.float32 \[3\]": [layout[0], ["b", [4], "torch.float32"]],
    }
    for message, other in others.items():
        with pytest.raises(RunError, match=message):
            verify_module._compare_layouts(path, layout, other)


def compare(value: torch.Tensor, other: torch.Tensor, exact: torch.Tensor | None = None) -> tuple[float, float]:
    make_exact = lambda: {} if exact is None else {"case/output": exact}  # noqa: E731
    return verify_module._compare(
        verify_module.Path("net.py"), {"case/output": value}, {"case/output": other}, make_exact
    )


def test_tolerance_is_relative_to_the_largest_number():
    value = torch.tensor([1000.0, 0.0])
    inside, outside = 0.5e-2, 2e-2  # of 1000 * 1e-5 = 1e-2
    assert compare(value, value + inside)[0] == pytest.approx(inside / 1000, rel=0.05)
    for wrong in (value + outside, value * float("nan"), value[:1]):
        with pytest.raises(RunError, match="output"):
            compare(value, wrong)
    assert OUTPUT_TOLERANCE == 1e-5


def test_rounding_of_the_model_itself_is_no_fault():
    value = torch.tensor([1000.0, 0.0])
    compare(value, value + 2e-2, exact=(value + 1e-2).double())
    with pytest.raises(RunError):
        compare(value, value + 2e-2, exact=(value + 1e-3).double())
    with pytest.raises(RunError):  # a model that is all rounding is not verified
        compare(value, value + 20, exact=(value + 100).double())


def test_dropout_is_compared_in_evaluation():
    dropping = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    random = torch.get_rng_state()
    cases, _ = make_cases(plain_copy(dropping), EXAMPLE, source=True)
    assert torch.equal(random, torch.get_rng_state())
    assert list(cases) == ["batch of 1", "batch of 3", "evaluation"]
    assert cases["evaluation"]["mode"] == "eval"
    assert "training" in make_cases(plain_copy(model()), EXAMPLE, source=True)[0]
    assert all(case["mode"] is None for case in make_cases(plain_copy(model()), EXAMPLE, source=False)[0].values())


def test_inputs_are_such_that_outputs_depend_on_them():
    """An untrained network in evaluation: its classifier's bias is nearly all that is seen."""
    space = load_space("nas-bench-macro")
    torch.manual_seed(0)
    network = plain_copy(space.build(space.sample(np.random.default_rng(0)), channels=2))
    inputs = like((torch.zeros(1, 3, 8, 8),), 4, torch.Generator().manual_seed(0))

    def spread(factor: float) -> float:
        with torch.no_grad():
            out = network(inputs[0] * factor)
        return float((out - out.mean(0)).abs().max() / out.abs().max())

    assert spread(1.0) < 1e-3
    assert spread(_factor(network, inputs)) > 1e-2
    assert _factor(nn.Flatten(), inputs) == 1.0


def test_examples_are_checked():
    with pytest.raises(UserError, match="batch dimension"):
        make_cases(model(), (torch.zeros(3, dtype=torch.long),), source=False)
    with pytest.raises(UserError, match="at most 1 inputs"):
        make_cases(model(), EXAMPLE * 2, source=False)


def test_a_model_that_breaks_down_is_said_to_be_the_cause(tmp_path):
    broken = model()
    nn.init.constant_(broken.head.bias, float("inf"))
    with pytest.raises(RunError, match="the model itself"):
        check(tmp_path, TEXT, of=broken)


@pytest.mark.parametrize("name", ["stem.0.weight", "last.1.running_var"])
def test_a_changed_weight_of_an_onnx_file_is_noticed(onnx_file, name):
    path, network, example = onnx_file
    changed = copy.deepcopy(network)
    tensor = changed.state_dict()[name].view(-1)
    tensor[0] += 0.1 * (tensor.abs().max() + 0.1)
    with pytest.raises(RunError, match=r"output \(batch of 1\) differs"):
        verify(path, changed, example)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory, importable):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        importable(package)
    space = load_space("nas-bench-macro")
    torch.manual_seed(0)
    network = space.build(space.sample(np.random.default_rng(0)), channels=2)
    example = (torch.zeros(2, 3, 8, 8),)
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    save_onnx(network, path, example)
    verify(path, network, example)
    return path, network, example


def test_weights_are_compared_bit_by_bit():
    expected = {"state/w": torch.ones(3), "state/count": torch.tensor(5)}
    path = verify_module.Path("net.pt2")
    assert verify_module._compare(path, expected, {**expected}, dict) == (0, 0)
    for wrong in ({"state/w": torch.ones(3) + 2e-7}, {"state/count": torch.tensor(6)}):
        with pytest.raises(RunError, match=r"has other values \(by up to"):
            verify_module._compare(path, expected, {**expected, **wrong}, dict)


def test_a_fixed_batch_size_is_noticed(tmp_path):
    path, network = tmp_path / "net.pt2", plain_copy(model())
    torch.export.save(torch.export.export(network, (torch.zeros(3, 3, 6, 6),)), path)
    with pytest.raises(RunError, match="does not run on its own"):
        verify(path, network, EXAMPLE)
