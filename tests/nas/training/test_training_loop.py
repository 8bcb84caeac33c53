"""The training loop: against a loop written out by hand, determinism, stopping, and going on bit by bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_trainings import network, patterns, same, weights
from torch import nn

from nas.training.checkpoints import load_state, save_state
from nas.training.data import Dataset
from nas.training.loop import STOP, advance, evaluate, result, start, train
from nas.training.recipe import Recipe
from search_spaces.common.errors import UserError


@pytest.fixture(scope="module")
def data() -> Dataset:
    return patterns()


RECIPE = Recipe(steps=20, batch_size=32, padding=1, flip=True, clip_norm=2.0, label_smoothing=0.1)


def test_training_equals_the_equations_written_out(data):
    """SGD with momentum, decay on weights of convolutions and linear layers, warm-up, line to zero, clipping."""
    recipe = replace(RECIPE, weight_decay=0.05)  # large enough to be seen
    ours, theirs = network(dropout=0.0), network(dropout=0.0)
    trained = train(ours, data, recipe, seed=4)
    stream = start(network(), data, recipe, seed=4).batches
    momentum = [torch.zeros_like(p) for p in theirs.parameters()]
    theirs.train()
    for step in range(20):
        images, labels, _ = stream.batch(step)
        logits = theirs(images).log_softmax(1)
        target = torch.full((32, 3), 0.1 / 3)
        target[range(32), labels] += 0.9
        loss = -(target * logits).sum(1).mean()
        assert loss.item() == pytest.approx(trained.losses[step], abs=2e-4)
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        scale = min(1.0, 2.0 / math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        rate = 0.1 * min(1, (step + 1) / 11) * min(1, (20 - step) / 4)
        with torch.no_grad():
            for (name, p), g, m in zip(theirs.named_parameters(), gradients, momentum, strict=True):
                decay = 0.05 if name in ("0.weight", "4.weight", "8.weight") else 0.0
                m.mul_(0.9).add_(g * scale + decay * p)
                p.sub_(rate * m)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-3)


def test_it_learns_and_repeats(data):
    first, second, other = network(), network(), network()
    before = torch.get_rng_state()
    results = [train(m, data, RECIPE, seed=s) for m, s in ((first, 0), (second, 0), (other, 1))]
    assert torch.equal(before, torch.get_rng_state())
    assert results[0].losses == results[1].losses
    assert same(weights(first), weights(second))
    assert results[0].metrics == results[1].metrics
    assert results[0].losses != results[2].losses
    assert results[0].metrics["val_acc"] > 66  # guessing gives 33
    assert results[0].late_loss == pytest.approx(sum(results[0].losses[10:]) / 10)


def test_going_on_is_bit_identical(data, tmp_path):
    """The break falls into the middle of an epoch, with dropout and augmentation drawing numbers."""
    straight = network()
    whole = train(straight, data, RECIPE, seed=7)
    torch.manual_seed(99)
    state = advance(start(network(), data, RECIPE, seed=7), RECIPE, steps=6)
    save_state(tmp_path / "c.pt", state, RECIPE)
    torch.manual_seed(100)
    resumed = network()
    state = load_state(tmp_path / "c.pt", resumed, data, RECIPE)
    assert state.step == 6
    found = result(advance(state, RECIPE), data, RECIPE)
    assert found.losses == whole.losses
    assert found.metrics == whole.metrics
    assert same(weights(straight), weights(resumed))


def test_a_ladder_continues_one_run(data):
    """More steps and a decay at the end, later, as one run that always meant to."""
    ladder = Recipe(steps=10, batch_size=32, schedule="constant")
    final = Recipe(steps=30, batch_size=32)
    climbing, direct = network(), network()
    state = advance(start(climbing, data, ladder, seed=0), ladder)
    advance(state, final)
    train(direct, data, final, seed=0)
    assert same(weights(climbing), weights(direct))


def test_a_callback_may_stop(data):
    seen = []

    def watch(step, metrics):
        seen.append((step, metrics["train_loss"]))
        return STOP if step == 3 else None

    found = train(network(), data, RECIPE, seed=0, callbacks=[watch])
    assert found.steps == 3
    assert found.stopped == "stopped by a callback at step 3"
    assert not found.failed
    assert "val_acc" in found.metrics
    assert seen == list(enumerate(found.losses, 1))


def test_a_loss_that_is_not_finite_ends_before_the_weights(data):
    class Bomb(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = nn.Linear(128, 3), 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x.flatten(1)) / (0.0 if self.calls == 4 else 1.0)

    model = Bomb()
    found = train(model, data, RECIPE, seed=0)
    assert found.stopped == "the training loss became nan at step 4"
    assert found.failed
    assert found.metrics == {}
    assert all(p.isfinite().all() for p in model.parameters())


def test_evaluation_counts_and_leaves_the_model_alone(data):
    model = network()
    before = weights(model)
    model.train()
    images, labels = data.val.images, data.val.labels
    found = evaluate(model, [(images[:20], labels[:20]), (images[20:], labels[20:])])
    assert model.training
    assert same(before, weights(model))
    model.eval()
    with torch.no_grad():
        logits = model(images)
    assert found["acc"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    loss = -logits.log_softmax(1)[range(45), labels].mean().item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["count"] == 45
    with pytest.raises(UserError, match="at least one image"):
        evaluate(model, [])


def test_batch_statistics_are_those_of_the_batch(data):
    """Dropout stays off and running statistics stay as they are."""
    model = network(dropout=0.5).eval()
    before = weights(model)
    found = evaluate(model, [(data.val.images, data.val.labels)], batch_statistics=True)
    assert same(before, weights(model))
    reference = network(dropout=0.0).train()
    logits = reference(data.val.images)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, data.val.labels).item(), rel=1e-5)
    plain = evaluate(model, [(data.val.images, data.val.labels)])
    assert plain["loss"] != pytest.approx(found["loss"], rel=1e-3)


def test_bad_models_and_batches(data):
    with pytest.raises(UserError, match="a model with parameters to train"):
        train(nn.Flatten(), data, RECIPE, seed=0)
    with pytest.raises(UserError, match="a batch size from 1 to the number of training images, 150"):
        train(network(), data, Recipe(batch_size=151), seed=0)
