"""The training loop: against a loop written out by hand, determinism, stopping, and going on bit by bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nas.training.data import Dataset, Split
from nas.training.loop import STOP, advance, evaluate, load_state, result, save_state, start, train
from nas.training.recipe import Recipe, parameter_groups
from search_spaces.common.errors import RunError, UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.module import GraphLayer


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Three classes of 8x8 noise around three patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 2, 8, 8, generator=generator)
    labels = torch.arange(240) % 3
    images = patterns[labels] + torch.randn(240, 2, 8, 8, generator=generator)
    parts = [Split(images[rows], labels[rows]) for rows in (slice(150), slice(150, 195), slice(195, 240))]
    return Dataset("patterns", *parts, ("a", "b", "c"), (0.0, 0.0), (1.0, 1.0))


def network(dropout: float = 0.2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(6, 8, 3),
            GraphLayer(layer("evonorm-b0"), 8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


RECIPE = Recipe(steps=20, batch_size=32, padding=1, flip=True, clip_norm=2.0, label_smoothing=0.1)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [v.clone() for v in model.state_dict().values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_training_equals_the_equations_written_out(data):
    """SGD with momentum, decay on weights of convolutions and linear layers, warm-up, line to zero, clipping."""
    recipe = replace(RECIPE, weight_decay=0.05)  # large enough to be seen
    ours, theirs = network(dropout=0.0), network(dropout=0.0)
    trained = train(ours, data, recipe, seed=4)
    stream = start(network(), data, recipe, seed=4).batches
    momentum = [torch.zeros_like(p) for p in theirs.parameters()]
    theirs.train()
    for step in range(20):
        images, labels = next(stream)
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


def test_checkpoints_that_do_not_fit(data, tmp_path):
    state = advance(start(network(), data, RECIPE, seed=0), RECIPE, steps=2)
    path = tmp_path / "c.pt"
    save_state(path, state, RECIPE)
    other = Recipe(steps=40, batch_size=16, padding=1, flip=True, clip_norm=2.0, label_smoothing=0.1)
    with pytest.raises(UserError, match=r"batch_size: 16 instead of 32$"):
        load_state(path, network(), data, other)
    with pytest.raises(UserError, match="a checkpoint of this model"):
        load_state(path, nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), data, RECIPE)
    with pytest.raises(UserError, match="that exists"):
        load_state(tmp_path / "d.pt", network(), data, RECIPE)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="a complete checkpoint"):
        load_state(path, network(), data, RECIPE)


def test_the_old_checkpoint_survives_a_full_disk(data, tmp_path, monkeypatch):
    state = advance(start(network(), data, RECIPE, seed=0), RECIPE, steps=1)
    save_state(tmp_path / "c.pt", state, RECIPE)
    saved = (tmp_path / "c.pt").read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match="No space left"):
        save_state(tmp_path / "c.pt", advance(state, RECIPE, steps=2), RECIPE)
    assert (tmp_path / "c.pt").read_bytes() == saved
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


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


def test_schedules():
    recipe = Recipe(steps=100, warmup_steps=4, learning_rate=1.0)
    assert [recipe.rate(k) for k in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert recipe.rate(79) == 1.0
    assert recipe.rate(90) == pytest.approx(0.5)
    assert Recipe(steps=100, schedule="constant").rate(99) == pytest.approx(0.1)
    assert Recipe(steps=100, schedule="cosine", warmup_steps=0).rate(50) == pytest.approx(0.05)


def test_only_weights_of_convolutions_and_linear_layers_decay():
    model = network()
    groups = parameter_groups(model, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in groups[0]["params"]] == ["0.weight", "4.weight", "8.weight"]
    assert groups[1]["weight_decay"] == 0.0
    assert sum(len(g["params"]) for g in groups) == len(names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "0: expected a positive number of steps"),
        ({"learning_rate": -1.0}, "a positive learning rate"),
        ({"schedule": "lineer"}, "did you mean 'linear'"),
        ({"optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"momentum": 1.0}, "a momentum below 1"),
        ({"clip_norm": 0.0}, "a positive gradient norm"),
    ],
)
def test_recipes_that_are_none(settings, message):
    with pytest.raises(UserError, match=message):
        Recipe(**settings)


def test_bad_models_and_batches(data):
    with pytest.raises(UserError, match="a model with parameters to train"):
        train(nn.Flatten(), data, RECIPE, seed=0)
    with pytest.raises(UserError, match="a batch size from 1 to the number of training images, 150"):
        train(network(), data, Recipe(batch_size=151), seed=0)
