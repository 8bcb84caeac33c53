"""Evaluation of models against scikit-learn, hand computations and closed forms; the model stays as it was."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, confusion_matrix, log_loss, top_k_accuracy_score
from torch import nn

from nas.training.data import Dataset, Split, load_data
from nas.training.evaluation import evaluate_model
from nas.training.evaluation.attack import Attack
from search_spaces.common.errors import RunError, UserError
from search_spaces.registry import load_space


def dataset(images: torch.Tensor, labels: torch.Tensor, classes: int, mean: float = 0.0, std: float = 1.0) -> Dataset:
    part, channels = Split(images, labels), images.shape[1]
    names = tuple(f"class-{k}" for k in range(classes))
    return Dataset("made-up", part, part, part, names, (mean,) * channels, (std,) * channels)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


@pytest.fixture(scope="module")
def model(digits) -> nn.Module:
    """A network of a space after a few steps, so that its answers differ between images."""
    torch.manual_seed(0)
    space = load_space("nas-bench-201")
    network = space.build((3, 1, 3, 1, 1, 2), in_channels=1, channels=4, cells_per_stage=1)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for step in range(25):
        rows = slice(40 * step, 40 * step + 40)
        optimizer.zero_grad()
        logits = network(digits.normalize(digits.train.images[rows]))
        nn.functional.cross_entropy(logits, digits.train.labels[rows]).backward()
        optimizer.step()
    return network


def measure(model, data, **more):
    return evaluate_model(model, data, **{"latency": False, **more})


@pytest.mark.parametrize("on", ["val", "test"])
def test_against_scikit_learn(model, digits, on):
    found = measure(model, digits, on=on, batch_size=37)
    split = getattr(digits, on)
    with torch.no_grad():
        logits = model.eval()(digits.normalize(split.images)).double()
    probabilities, true = logits.softmax(1).numpy(), split.labels.numpy()
    predicted = probabilities.argmax(1)
    assert found.count == len(true)
    assert 20 < found.accuracy < 100
    assert math.isclose(found.accuracy, 100 * (predicted == true).mean())
    assert math.isclose(found.top5_accuracy, 100 * top_k_accuracy_score(true, probabilities, k=5))
    assert math.isclose(found.loss, log_loss(true, probabilities), rel_tol=1e-5)
    assert math.isclose(
        found.brier, brier_score_loss(true, probabilities, labels=range(10), scale_by_half=False), rel_tol=1e-5
    )
    assert np.array_equal(found.confusion, confusion_matrix(true, predicted))
    assert found.accuracy_interval[0] < found.accuracy < found.accuracy_interval[1]
    assert found.top5_interval[0] < found.top5_accuracy <= found.top5_interval[1]
    first = found.confused_pairs[0]
    assert first.count == max((n, 0)[i == j] for i, row in enumerate(found.confusion) for j, n in enumerate(row))
    assert found.params == sum(p.numel() for p in model.parameters())
    space = load_space("nas-bench-201")
    cost = space.cost((3, 1, 3, 1, 1, 2), in_channels=1, channels=4, cells_per_stage=1, input_size=8)
    assert found.macs == cost["macs"]


def test_by_hand():
    """Logits given as pixels. Image 0: right at 0.7; 1: wrong at 0.6; 2: a tie, which the first class wins."""
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.4, 0.4, 0.2]])
    data = dataset(probabilities.log().reshape(3, 3, 1, 1), torch.tensor([0, 2, 1]), 3)
    found = measure(nn.Flatten(), data)
    assert math.isclose(found.accuracy, 100 / 3)
    assert found.top5_accuracy is None
    assert found.top5_interval is None
    assert math.isclose(found.loss, -(math.log(0.7) + math.log(0.1) + math.log(0.4)) / 3, rel_tol=1e-6)
    brier = (0.09 + 0.04 + 0.01) + (0.09 + 0.36 + 0.81) + (0.16 + 0.36 + 0.04)
    assert math.isclose(found.brier, brier / 3, rel_tol=1e-6)
    assert math.isclose(found.calibration_error, 100 * (0.3 + 0.6 + 0.4) / 3, rel_tol=1e-6)
    assert found.confusion == ((1, 0, 0), (1, 0, 0), (0, 1, 0))
    assert found.class_accuracy == (100.0, 0.0, 0.0)
    assert [(p.true, p.predicted) for p in found.confused_pairs] == [("class-1", "class-0"), ("class-2", "class-1")]
    assert found.macs == found.params == 0


def test_ties_are_broken_alike():
    """Equal logits for ten classes: the top five are the first five, and the true class's accuracy is its share."""
    data = dataset(torch.zeros(10, 10, 1, 1), torch.arange(10), 10)
    found = measure(nn.Flatten(), data)
    assert (found.accuracy, found.top5_accuracy) == (10.0, 50.0)


def test_accuracy_under_attack_in_closed_form():
    """A linear classifier of two classes falls exactly where its margin is below the L1 norm of the weight difference
    times epsilon in normalised pixels; pixels are far from 0 and 1."""
    torch.manual_seed(3)
    images = 0.3 + 0.4 * torch.rand(400, 3, 4, 4)
    data = dataset(images, torch.randint(2, (400,)), 2, mean=0.5, std=0.25)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():
        logits = model(data.normalize(images))
        difference = model[1].weight[0] - model[1].weight[1]
    margin = logits[torch.arange(400), data.val.labels] - logits[torch.arange(400), 1 - data.val.labels]
    for attack in (Attack(epsilon=0.01), Attack("fgsm", epsilon=0.02, count=150)):
        found = measure(model, data, attack=attack, batch_size=64).robustness
        count = attack.count or 400
        assert found.count == count
        assert math.isclose(found.clean_accuracy, 100 * (margin[:count] > 0).float().mean().item(), rel_tol=1e-6)
        fall = (difference.abs().sum() * attack.epsilon / 0.25).item()
        assert math.isclose(found.accuracy, 100 * (margin[:count] > fall).float().mean().item(), rel_tol=1e-6)
        assert 0 < found.accuracy < found.clean_accuracy
        assert found.interval[0] < found.accuracy < found.interval[1]


def test_bytes_and_floats_are_attacked_alike(model, digits):
    whole = replace(digits, val=Split((digits.val.images * 255).round().to(torch.uint8), digits.val.labels))
    unit = replace(digits, val=Split(whole.val.images.float() / 255, digits.val.labels))
    first, second = (measure(model, data, attack=Attack(steps=2), seed=5) for data in (whole, unit))
    assert first.accuracy == second.accuracy
    assert first.robustness == second.robustness
    assert first.robustness.accuracy < first.accuracy


def test_the_model_is_left_as_it_was(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10))
    model(digits.train.images[:8]).sum().backward()
    model[2].eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    parameters, state = list(model.parameters()), torch.get_rng_state()
    told = []
    evaluate_model(
        model, digits, attack=Attack(steps=1, count=20), compiled=False, progress=lambda *done: told.append(done)
    )
    assert told[-1] == (len(digits.val) + 20, len(digits.val) + 20)
    assert [m.training for m in model] == [True, True, False, True, True]
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(p is q and p.requires_grad for p, q in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert calls
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model] == [1, 0, 0, 0, 0]
    broken = replace(digits, val=Split(torch.full((2, 1, 8, 8), math.nan), torch.tensor([0, 1])))
    with pytest.raises(RunError):
        measure(model, broken)
    assert [m.training for m in model] == [True, True, False, True, True]


def test_json_is_plain(model, digits):
    found = evaluate_model(model, digits, compiled=False, attack=Attack(steps=1, count=10)).as_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"accuracy", "calibration_error", "bins", "confusion", "macs", "timings", "robustness"} <= set(found)
    assert [t["batch_size"] for t in found["timings"]] == [1, 64]
    assert found["robustness"]["attack"]["name"] == "pgd"
    assert found["peak_activation_bytes"] > 0
    assert found["training_activation_bytes"] > found["peak_activation_bytes"]


def test_the_first_image_that_is_not_finite_is_named(digits):
    images = digits.val.images.clone()
    images[[70, 90]] = math.inf
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(RunError, match="val image 70 is not finite"):
        measure(model, replace(digits, val=Split(images, digits.val.labels)), batch_size=32)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 100)), {}, "a model of 100 classes.*the 10 classes of digits"),
        (nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()), {}, "digits images of 1 x 8 x 8.*3 channels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(128, 10)), {}, "digits images of 1 x 8 x 8"),
        (nn.Identity(), {}, r"logits \[batch, classes\]"),
        (nn.Identity(), {"on": "vall"}, "did you mean 'val'"),
        (nn.Identity(), {"on": "train"}, "a part of the data"),
        (nn.Identity(), {"batch_size": 0}, "at least 1"),
        (nn.Identity(), {"device": "cpuu"}, "did you mean 'cpu'"),
    ],
)
def test_what_does_not_fit(model, more, message, digits):
    with pytest.raises(UserError, match=message):
        measure(model, digits, **more)


def test_no_images(digits):
    with pytest.raises(UserError, match="0 val images"):
        measure(nn.Flatten(), replace(digits, val=Split(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_here(digits):
    with pytest.raises(UserError, match="did you mean 'cpu'"):
        measure(nn.Flatten(), digits, device="cuda")


@pytest.mark.gpu
def test_on_a_gpu(model, digits):
    attack = Attack(steps=2)
    here = evaluate_model(model, digits, compiled=False, attack=attack)
    there = evaluate_model(model, digits, compiled=False, attack=attack, device="cuda")
    assert next(model.parameters()).device.type == "cpu"
    assert math.isclose(here.loss, there.loss, rel_tol=1e-3)
    assert here.macs == there.macs
    assert abs(here.robustness.accuracy - there.robustness.accuracy) < 2
    assert there.peak_activation_bytes >= here.peak_activation_bytes
