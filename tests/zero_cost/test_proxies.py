"""Values against straightforward references: one proxy at a time, no sharing, from the formula."""

from __future__ import annotations

import numpy as np
import proxy_references as reference
import pytest
import torch
from torch import nn

import zero_cost
from search_spaces import load_space

SPACE = load_space("nas-bench-201")
CELLS = (
    "|nor_conv_3x3~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|skip_connect~0|none~1|avg_pool_3x3~2|",
    "|none~0|+|nor_conv_3x3~0|nor_conv_1x1~1|+|none~0|nor_conv_3x3~1|nor_conv_1x1~2|",  # one dead convolution
)


def network(cell: str, channels: int = 4, seed: int = 0, **scale) -> torch.nn.Module:
    torch.manual_seed(seed)
    return SPACE.build(SPACE.decode(cell), channels=channels, cells_per_stage=1, **scale)


def images(count: int = 16, seed: int = 0, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, 16, 16, generator=generator)
    return inputs, torch.randint(classes, (count,), generator=generator)


@pytest.fixture(scope="module", params=CELLS, ids=["all live", "one dead"])
def scored(request):
    """(model, batches, every score of it)."""
    model, batches = network(request.param), [images(seed=1), images(seed=2)]
    return model, batches, zero_cost.score(model, batches)


FIRST_ORDER = ("grad-norm", "snip", "plain", "fisher", "l2-norm", "knas", "jacov", "epe-nas", "nwot")
OTHERS = ("synflow", "logsynflow", "synflow-forward", "swap", "linear-regions")


@pytest.mark.parametrize("name", [*FIRST_ORDER, *OTHERS])
def test_value_equals_the_formula_by_itself(scored, name):
    model, batches, scores = scored
    expected = getattr(reference, name.replace("-", "_"))(model, *batches[0])
    assert scores[name] == pytest.approx(expected, rel=1e-6), scores.reasons.get(name)


def test_grasp_equals_two_passes(scored):
    model, batches, scores = scored
    assert scores["grasp"] == pytest.approx(reference.grasp(model, *batches[0]), rel=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_zico_equals_the_statistics_of_the_batches(scored, count):
    model, *_ = scored
    batches = [images(seed=s) for s in range(count)]
    found = zero_cost.score(model, batches, "zico", batches=count)
    assert found["zico"] == pytest.approx(reference.zico(model, batches), rel=1e-6)


@pytest.mark.parametrize("name", ["meco", "meco-opt", "gradsign"])
def test_value_in_double_precision_equals_the_formula_by_itself(name):
    """Where ties of signs or small eigenvalues make float32 depend on the order of sums."""
    for cell in CELLS:
        model, (inputs, labels) = network(cell).double(), images()
        scores = zero_cost.score(model, (inputs.double(), labels), name)
        expected = getattr(reference, name.replace("-", "_"))(model, inputs.double(), labels)
        assert scores[name] == pytest.approx(expected, rel=1e-6), scores.reasons


def test_ntk_equals_one_graph_per_sample(scored):
    model, batches, scores = scored
    kernel = reference.ntk(model, batches[0][0])
    values = np.linalg.eigvalsh(kernel)
    assert scores["ntk-trace"] == pytest.approx(np.sqrt(np.trace(kernel) / len(kernel)), rel=1e-6)
    assert scores["ntk-condition"] == pytest.approx(-values[-1] / values[0], rel=1e-4)


def test_zen_equals_the_running_variances_of_batch_norm(scored):
    model, batches, scores = scored
    assert scores["zen"] == pytest.approx(reference.zen(model, batches[0][0]), rel=1e-6)


def test_az_nas_equals_stage_by_stage(scored):
    model, batches, scores = scored
    for name, expected in reference.az_nas(model, batches[0][0]).items():
        assert scores[name] == pytest.approx(expected, rel=1e-5), name


def test_dextr_equals_central_differences_on_a_smooth_network():
    torch.manual_seed(0)
    model = SPACE.build(SPACE.decode(CELLS[0]), channels=4, cells_per_stage=1, act=lambda _: nn.Tanh()).double()
    inputs, labels = images()
    found = zero_cost.score(model, (inputs.double(), labels), "dextr")
    assert found["dextr"] == pytest.approx(reference.dextr(model, inputs.double()), rel=1e-5), found.reasons


def test_per_sample_gradients_of_every_kind_of_layer():
    """Groups, dilation, strides, string padding, one and three dimensions, transposition, a layer used twice."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)
            self.dilated = nn.Conv2d(8, 8, (3, 1), dilation=2, padding="same")
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.line = nn.Conv1d(4, 6, 3)
            self.volume = nn.Conv3d(1, 2, 3, padding=1)
            self.twice = nn.Linear(6, 6)
            self.head = nn.Linear(6, 10)

        def forward(self, x):
            x = self.up(self.dilated(self.grouped(x)).relu())
            x = self.volume(x[:, None]).relu().sum(1)
            x = self.line(x.flatten(2)).relu().mean(2)
            return self.head(self.twice(self.twice(x).relu()))

    torch.manual_seed(0)
    model = Mixed().double()
    inputs, labels = torch.randn(5, 4, 8, 8).double(), torch.arange(5)
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    signs = []
    for n in range(5):
        one = torch.nn.functional.cross_entropy(model(inputs[n : n + 1]), labels[n : n + 1])
        signs.append([g.sign() for g in torch.autograd.grad(one, weights)])
    expected = sum(float(sum(layer).abs().sum()) for layer in zip(*signs))
    assert zero_cost.score(model, (inputs, labels), "gradsign")["gradsign"] == expected


def test_hash_code_measures_by_counting():
    """Four samples, two of them alike."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    inputs = torch.tensor([[1.0, 1.0], [2.0, 3.0], [1.0, -1.0], [-1.0, -1.0]])
    # codes 11, 11, 10, 00: three regions, one of them shared; neighbours: 0-1, 1-0, 2-{0, 1, 3}, 3-2
    scores = zero_cost.score(model, (inputs, torch.tensor([0, 0, 0, 1])), ["linear-regions", "hash-redundancy"])
    assert scores["linear-regions"] == 3
    assert scores["hash-redundancy"] == pytest.approx(-1 / 3)
    accuracy = zero_cost.score(model, (inputs, torch.tensor([0, 0, 0, 1])), "hash-accuracy")["hash-accuracy"]
    assert accuracy == pytest.approx(100 * (1 + 1 + 2 / 3 + 0) / 4)


def test_regularised_swap():
    model, batch = network(CELLS[0]), images()
    found = zero_cost.score(model, batch, ["swap", "reg-swap", "params"], regularisation=(10_000.0, 1e8))
    expected = found["swap"] * np.exp(-((found["params"] - 10_000.0) ** 2) / 1e8)
    assert found["reg-swap"] == pytest.approx(expected)


def test_epe_nas_with_more_than_a_hundred_classes():
    model = network(CELLS[0], num_classes=120)
    inputs, _ = images()
    labels = torch.arange(16) // 4 + 100
    labels[-1] = 0  # one class of a single sample, one of three
    expected = reference.epe_nas(model, inputs, labels, classes=120)
    assert zero_cost.score(model, (inputs, labels), "epe-nas")["epe-nas"] == pytest.approx(expected, rel=1e-6)


def test_every_proxy_states_what_it_is(scored):
    for name, found in zero_cost.PROXIES.items():
        assert found.name == name
        assert found.formula
        assert found.source
        assert found.sign in (1, -1)
    model, (batch, *_), _ = scored
    unlabelled = zero_cost.score(model, batch[0])
    refused = {name for name, reason in unlabelled.reasons.items() if reason == "needs labels"}
    assert refused == {name for name, found in zero_cost.PROXIES.items() if found.labels}
    assert "grad-norm" in refused
    assert "nwot" not in refused


def test_a_forward_only_proxy_runs_no_backward(scored, monkeypatch):
    model, batches, scores = scored

    def refuse(*args, **kwargs):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    names = [name for name, found in zero_cost.PROXIES.items() if not found.backward]
    found = zero_cost.score(model, batches, names)
    assert {"nwot", "swap", "meco", "zen", "synflow-forward", "params", "l2-norm"} <= set(names)
    for name in names:
        assert found[name] == pytest.approx(scores[name], nan_ok=True)


def test_a_proxy_of_ones_own(scored):
    model, batches, _ = scored

    @zero_cost.proxy("peak", needs=("gradients",), formula="max_l max |g_l|", source="a test")
    def peak(captured):
        return max(g.abs().max() for g in captured.gradients.values())

    expected = max(float(g.abs().max()) for _, g in reference.loss_gradients(model, *batches[0]))
    assert zero_cost.score(model, batches, [peak])["peak"] == pytest.approx(expected, rel=1e-6)
