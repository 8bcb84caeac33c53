"""What a recipe can switch on: moving average, auxiliary head, smoothing, mixing, precisions, compiling; NaN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_trainings import network, patterns, same, weights
from torch import nn

from nas.training.loop import STOP, advance, check_model, start, train
from nas.training.preflight import forecast
from nas.training.recipe import Recipe
from search_spaces.common.errors import RunError, UserError
from search_spaces.registry import load_space

RECIPE = Recipe(steps=8, batch_size=32, warmup_steps=0, clip_norm=5.0)


def darts(auxiliary: bool = True) -> nn.Module:
    """A small DARTS network; the draw of the weights is the same with and without the head, except for the head."""
    space = load_space("darts")
    arch = space.sample(np.random.default_rng(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return space.build(arch, in_channels=2, num_classes=3, channels=2, layers=3, auxiliary=auxiliary)


def test_the_moving_average_is_its_recurrence():
    """e = d e + (1 - d) w after every step, from the weights after the first; running averages of BatchNorm too."""
    recipe = replace(RECIPE, ema_decay=0.7)
    state, seen = start(network(), patterns(), recipe, seed=0), []

    def watch(step, metrics):
        seen.append({k: v.double() for k, v in state.model.state_dict().items()})

    advance(state, recipe, callbacks=[watch])
    expected = seen[0]
    for after in seen[1:]:
        expected = {k: 0.7 * v + 0.3 * after[k] for k, v in expected.items()}
    for name, value in state.evaluated.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    plain = start(network(), patterns(), RECIPE, seed=0)
    advance(plain, RECIPE)
    assert same(weights(plain.model), weights(state.model))  # the average changes nothing in the training
    assert plain.evaluated is plain.model


def test_the_auxiliary_loss_is_added_with_its_weight():
    recipe = replace(RECIPE, steps=1, auxiliary_weight=0.4, label_smoothing=0.1)
    model, reference = darts(), darts().train()
    found = train(model, patterns(), recipe, seed=0)
    batch = start(darts(), patterns(), recipe, seed=0).batches.batch(0)
    main, auxiliary = reference.forward_with_auxiliary(batch.images)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    loss = criterion(main, batch.labels) + 0.4 * criterion(auxiliary, batch.labels)
    assert found.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    before, after = darts().auxiliary_head.classifier.weight, model.auxiliary_head.classifier.weight
    assert not torch.equal(before, after)


def test_without_weight_the_head_is_left_alone_and_never_evaluated():
    model = darts()
    before = [p.clone() for p in model.auxiliary_head.parameters()]
    train(model, patterns(), replace(RECIPE, steps=2, weight_decay=0.1), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.auxiliary_head.parameters(), strict=True))
    with pytest.raises(UserError, match="a network without auxiliary head"):
        train(darts(auxiliary=False), patterns(), replace(RECIPE, auxiliary_weight=0.4), seed=0)


def test_weights_of_an_auxiliary_training_load_without_the_head(tmp_path):
    from nas.training.runs import train_run
    from nas.training.task import Task
    from nas.training.trained import load_trained

    space = load_space("darts")
    arch = space.encode(space.sample(np.random.default_rng(0)))
    recipe = Recipe(epochs=1, batch_size=75, warmup_steps=0, auxiliary_weight=0.4, drop_path=0.2, ema_decay=0.5)
    scale = {"channels": 2, "layers": 3, "auxiliary": True}
    task = Task(recipe, "darts", arch, network=scale, data="small_trainings:pictures")
    found = load_trained(str(train_run(task, tmp_path / "run").path))
    assert found.model.auxiliary_head is None
    assert found.metrics["val_acc"] == pytest.approx(train_again(task), abs=1e-9)


def train_again(task) -> float:
    data = task.open_data()
    found = train(task.make_network(data, seed=0), data, task.recipe, seed=0)
    return found.metrics["val_acc"]


@pytest.mark.parametrize("mix", [{}, {"mixup": 0.5}])
def test_smoothing_and_mixed_targets_in_the_loss(mix):
    """- sum of q log p with q = (1 - s) targets + s / classes (Szegedy et al. 2016, section 7)."""
    recipe = replace(RECIPE, steps=1, label_smoothing=0.2, **mix)
    found = train(network(dropout=0.0), patterns(), recipe, seed=0)
    batch = start(network(), patterns(), recipe, seed=0).batches.batch(0)
    logits = network(dropout=0.0).train()(batch.images).log_softmax(1)
    targets = batch.targets if mix else nn.functional.one_hot(batch.targets, 3).float()
    expected = -((0.8 * targets + 0.2 / 3) * logits).sum(1).mean()
    assert found.losses[0] == pytest.approx(expected.item(), rel=1e-6)
    assert bool(mix) == (((targets > 0) & (targets < 1)).any().item())


# -- precisions, memory formats, compiling -----------------------------------------------------------------------


def test_bfloat16_runs_and_weights_stay_float32():
    plain, rough = network(dropout=0.0), network(dropout=0.0)
    exact = train(plain, patterns(), RECIPE, seed=0)
    kinds: set[torch.dtype] = set()
    hook = rough[4].register_forward_hook(lambda m, i, o: kinds.add(o.dtype) if m.training else None)
    found = train(rough, patterns(), replace(RECIPE, precision="bfloat16"), seed=0)
    hook.remove()
    assert torch.bfloat16 in kinds
    assert {p.dtype for p in rough.parameters()} == {torch.float32}
    assert found.losses != exact.losses
    assert found.losses == pytest.approx(exact.losses, rel=0.1)  # bfloat16 has 8 bits


def test_float16_scales_its_loss():
    """A gradient that overflows leaves its step out and halves the scale; weights stay finite."""
    recipe = replace(RECIPE, precision="float16")
    state = start(network(dropout=0.0), patterns(), recipe, seed=0)
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**40})
    advance(state, recipe)
    assert not state.failed
    assert state.scaler.get_scale() < 2.0**40
    assert all(v.isfinite().all() for v in state.model.state_dict().values())
    exact = train(network(dropout=0.0), patterns(), RECIPE, seed=0)
    plain = train(network(dropout=0.0), patterns(), recipe, seed=0)
    assert plain.losses == pytest.approx(exact.losses, rel=0.02)


def test_channels_last_gives_the_same_losses():
    """Without dropout, whose numbers are drawn in the order of memory."""
    exact = train(network(dropout=0.0), patterns(), RECIPE, seed=0)
    model = network(dropout=0.0)
    found = train(model, patterns(), replace(RECIPE, channels_last=True), seed=0)
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[4].weight.is_contiguous()
    assert found.losses == pytest.approx(exact.losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9, "precision": "bfloat16", "channels_last": True}])
def test_compiled_equals_eager(settings):
    """With a forecast before it, which counts what is kept for the backward pass and times no compiling."""
    recipe = replace(RECIPE, **settings)
    compiled = replace(recipe, kernels="compile")
    exact = train(network(dropout=0.0), patterns(), recipe, seed=0)
    state = start(network(dropout=0.0), patterns(), compiled, seed=0)
    found = forecast(state, compiled, 8)
    assert found.memory_bytes > sum(p.nbytes for p in state.model.parameters())
    assert found.step_seconds < 0.5
    assert advance(state, compiled).losses == pytest.approx(exact.losses, rel=0.05 if settings else 1e-4)
    assert list(state.model.state_dict()) == list(network().state_dict())


# -- what is not finite, what does not fit -----------------------------------------------------------------------


class Poisoned(nn.Module):
    """Its loss is finite, its gradient is not: the derivative of sqrt at 0 is infinite, times 0."""

    def __init__(self, at: int):
        super().__init__()
        self.inner, self.at, self.calls = nn.Linear(128, 3), at, 0
        self.inner.load_state_dict({"weight": torch.linspace(-0.1, 0.1, 384).view(3, 128), "bias": torch.zeros(3)})

    def forward(self, x):
        self.calls += self.training
        found = self.inner(x.flatten(1))
        return found + (found - found).sqrt() if self.calls == self.at else found


@pytest.mark.parametrize("settings", [{}, {"clip_norm": None}, {"optimizer": "adamw"}, {"ema_decay": 0.9}])
@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(settings, at):
    recipe = replace(RECIPE, **settings)
    model, reference = Poisoned(at), Poisoned(0)
    state = advance(start(model, patterns(), recipe, seed=0), recipe)
    before = advance(start(reference, patterns(), recipe, seed=0), recipe, steps=at - 1)
    assert state.failed
    assert state.stopped == f"the norm of the gradient became nan at step {at}"
    assert len(state.losses) == at
    assert np.isfinite(state.losses).all()
    assert same(weights(model), weights(reference))
    assert same(weights(state.evaluated), weights(before.evaluated))
    assert advance(state, recipe).step == at  # it does not go on


def test_float16_that_overflows_at_every_scale_fails():
    recipe = replace(RECIPE, steps=200, precision="float16", clip_norm=None)

    class Always(Poisoned):
        def forward(self, x):
            found = self.inner(x.flatten(1))
            return found + (found - found).sqrt()

    model = Always(0)
    before = weights(model)
    found = train(model, patterns(), recipe, seed=0)
    assert found.failed
    assert found.steps < 50
    assert found.metrics == {}
    assert same(before, weights(model))


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2.00 GiB", "[enforce] can't allocate memory"]
)
def test_memory_that_runs_out(message):
    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            raise (torch.OutOfMemoryError if "CUDA" in message else RuntimeError)(message)

    with pytest.raises(RunError, match="out of memory with batches of 32 images; lower batch_size, channels or layers"):
        train(Full(), patterns(), RECIPE, seed=0)
    with pytest.raises(RunError, match="out of memory with two images"):
        check_model(Full(), patterns())


def test_other_errors_are_left_as_they_are():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            raise self.error

    for error in (RuntimeError("another"), ValueError("another"), IndexError("another")):
        model = Broken()
        model.error = error
        with pytest.raises(type(error), match="another") as caught:
            train(model, patterns(), RECIPE, seed=0)
        assert caught.value is error


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_that_the_model_has_no_output_for(smoothing):
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 2))
    with pytest.raises(UserError, match="label 2.*labels below the model's number of outputs"):
        train(model, patterns(), replace(RECIPE, label_smoothing=smoothing), seed=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(128, 10)), "10 outputs.*as many as patterns has, 3"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "images of 2x8x8.*images that the model takes"),
        (nn.Conv2d(2, 3, 3), r"\(2, 3, 6, 6\).*one row of logits for each image, \[2, 3\]"),
        (nn.LSTM(8, 3), "images of 2x8x8|tuple"),
    ],
)
def test_models_that_do_not_fit_the_data(model, message):
    with pytest.raises(UserError, match=message):
        check_model(model, patterns())


def test_checking_a_model_leaves_it_alone():
    model = network().train()
    before, random = weights(model), torch.get_rng_state()
    check_model(model, patterns())
    assert model.training
    assert same(before, weights(model))
    assert torch.equal(random, torch.get_rng_state())


def test_a_state_that_stopped_stays_stopped():
    state = start(network(), patterns(), RECIPE, seed=0)
    advance(state, RECIPE, callbacks=[lambda step, metrics: STOP if step == 2 else None])
    assert (state.step, state.stopped, state.failed) == (2, "stopped by a callback at step 2", False)
    assert advance(state, RECIPE).step == 2
