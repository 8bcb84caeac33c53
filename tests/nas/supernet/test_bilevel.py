"""The two levels: against functional unrolling, torch's own SGD, closed forms, and DARTS's solvable example."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from nas.supernet.bilevel import first_order, kept, relaxed_step, second_order, set_gradients
from search_spaces.common.errors import UserError

SETTINGS = [
    {"momentum": 0.0, "weight_decay": 0.0},
    {"momentum": 0.9, "weight_decay": 3e-4},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
]


class Smooth:
    """A small problem with curvature everywhere: a mixture of two one-layer networks, weights and alpha in float64."""

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.weights = [nn.Parameter(draw(3, 4)), nn.Parameter(draw(3, 4)), nn.Parameter(draw(3))]
        self.alphas = [nn.Parameter(draw(2)), nn.Parameter(draw(1))]
        self.batches = {name: (draw(6, 4), draw(6, 3)) for name in ("train", "val")}

    def value(self, name, weights, alphas):
        x, y = self.batches[name]
        share = alphas[0].softmax(0)
        out = share[0] * torch.tanh(x @ weights[0].T) + share[1] * torch.sin(x @ weights[1].T)
        return (out + weights[2] * torch.sigmoid(alphas[1]) - y).square().mean()

    def train(self):
        return self.value("train", self.weights, self.alphas)

    def val(self):
        return self.value("val", self.weights, self.alphas)


def warmed(problem, settings, steps=3, lr=0.1):
    """SGD whose momentum buffers have been filled by some steps."""
    optimizer = torch.optim.SGD(problem.weights, lr=lr, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.train().backward()
        optimizer.step()
    return optimizer


def unrolled(problem, optimizer, settings, alphas):
    """The validation loss after one SGD step, as one differentiable expression of alpha."""
    weights = [w.detach().requires_grad_() for w in problem.weights]
    slopes = torch.autograd.grad(problem.value("train", weights, alphas), weights, create_graph=True)
    after = []
    for w, own, slope in zip(weights, problem.weights, slopes):
        g = slope + settings["weight_decay"] * w
        state = optimizer.state.get(own, {}).get("momentum_buffer")
        buffer = g if state is None else settings["momentum"] * state + g
        step = g + settings["momentum"] * buffer if settings.get("nesterov") else buffer
        after.append(w - optimizer.param_groups[0]["lr"] * step)
    return problem.value("val", after, alphas)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("steps", [0, 3])
def test_exact_second_order_is_the_gradient_through_the_unrolled_step(settings, steps):
    problem = Smooth()
    optimizer = warmed(problem, settings, steps)
    expected = unrolled(problem, optimizer, settings, problem.alphas)
    slopes = torch.autograd.grad(expected, problem.alphas)
    loss, found = second_order(problem.train, problem.val, problem.alphas, optimizer, exact=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(found, slopes):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
def test_finite_difference_second_order_is_near_the_exact_one(settings):
    """Its error is of the order of radius^2: the default is close, a tenth of it a hundred times closer."""
    problem = Smooth(1)
    optimizer = warmed(problem, settings)
    _, exact = second_order(problem.train, problem.val, problem.alphas, optimizer, exact=True)
    errors = []
    for radius in (0.01, 0.001):
        _, found = second_order(problem.train, problem.val, problem.alphas, optimizer, radius=radius)
        errors.append(max((a - b).abs().max().item() for a, b in zip(found, exact)))
    plain = first_order(problem.val, problem.alphas)[1]
    gap = max((a - b).abs().max().item() for a, b in zip(plain, exact))
    assert errors[0] < 1e-3 * gap
    assert errors[1] < 0.02 * errors[0]


def test_the_default_difference_serves_in_single_precision():
    """Where a much smaller radius would drown in rounding."""
    problem = Smooth(1)
    for p in (*problem.weights, *problem.alphas):
        p.data = p.data.float()
    problem.batches = {name: (x.float(), y.float()) for name, (x, y) in problem.batches.items()}
    optimizer = warmed(problem, SETTINGS[1])
    _, exact = second_order(problem.train, problem.val, problem.alphas, optimizer, exact=True)
    through = [e - d for e, d in zip(exact, first_order(problem.val, problem.alphas)[1])]
    errors = []
    for radius in (0.01, 1e-6):
        _, found = second_order(problem.train, problem.val, problem.alphas, optimizer, radius=radius)
        errors.append(max((a - b).abs().max().item() for a, b in zip(found, exact)))
    largest = max(t.abs().max().item() for t in through)
    assert errors[0] < 0.01 * largest
    assert errors[1] > 10 * errors[0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_returned_is_the_one_after_torchs_own_step(settings):
    problem = Smooth(2)
    optimizer = warmed(problem, settings)
    loss, _ = second_order(problem.train, problem.val, problem.alphas, optimizer)
    optimizer.zero_grad()
    problem.train().backward()
    optimizer.step()
    assert loss.item() == pytest.approx(problem.val().item(), rel=1e-12)


def test_groups_keep_their_own_rates_and_decays():
    problem = Smooth(3)
    groups = [
        {"params": problem.weights[:1], "lr": 0.3, "weight_decay": 0.2},
        {"params": problem.weights[1:], "lr": 0.05, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)

    def after(alphas):
        weights = [w.detach().requires_grad_() for w in problem.weights]
        slopes = torch.autograd.grad(problem.value("train", weights, alphas), weights, create_graph=True)
        rates, decays = (0.3, 0.05, 0.05), (0.2, 0.0, 0.0)
        moved = [w - r * (s + d * w) for w, s, r, d in zip(weights, slopes, rates, decays)]
        return problem.value("val", moved, alphas)

    expected = torch.autograd.grad(after(problem.alphas), problem.alphas)
    for exact, tolerance in ((True, 1e-10), (False, 1e-3)):
        _, found = second_order(problem.train, problem.val, problem.alphas, optimizer, exact=exact)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-9)


def test_first_order_against_finite_differences():
    problem = Smooth(4)
    loss, found = first_order(problem.val, problem.alphas)
    assert loss.item() == problem.val().item()
    for alpha, slope in zip(problem.alphas, found):
        for i in range(alpha.numel()):
            sides = []
            for h in (1e-6, -1e-6):
                with kept([alpha]), torch.no_grad():
                    alpha[i] += h
                    sides.append(problem.val().item())
            assert slope[i].item() == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


class Gated(nn.Module):
    """A convolution with BatchNorm, scaled by a gate; one weight and one alpha are not used."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x, alpha):
        return self.head((torch.sigmoid(alpha[0]) * torch.tanh(self.norm(self.convolution(x)))).mean((2, 3)))


@pytest.mark.parametrize("exact", [False, True])
def test_weights_and_statistics_have_the_same_bits_afterwards(exact):
    torch.manual_seed(0)
    network, x = Gated(), torch.randn(2, 8, 2, 6, 6)
    labels = torch.arange(8) % 2
    alphas = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    def loss(batch):
        return lambda: nn.functional.cross_entropy(network(x[batch], alphas[0]), labels)

    for _ in range(2):
        optimizer.zero_grad()
        loss(0)().backward()
        optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(network.state_dict())
    momenta = copy.deepcopy(optimizer.state_dict()["state"])
    arguments = (loss(0), loss(1), alphas, optimizer)
    _, found = second_order(*arguments, buffers=list(network.buffers()), exact=exact)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert momenta.keys() == after.keys()
    assert all(torch.equal(momenta[i]["momentum_buffer"], after[i]["momentum_buffer"]) for i in momenta)
    assert all(p.grad is None for p in network.parameters())
    assert found[0].abs().max() > 0
    assert not found[1].any()
    # Without the buffers the statistics move, as in any forward pass: the test above can fail.
    second_order(*arguments, exact=exact)
    assert not torch.equal(network.norm.running_mean, before["norm.running_mean"])


def test_weights_come_back_when_a_loss_fails():
    problem = Smooth()
    before = [w.detach().clone() for w in problem.weights]

    def broken():
        raise RuntimeError("no batch left")

    with pytest.raises(RuntimeError, match="no batch left"):
        second_order(problem.train, broken, problem.alphas, warmed(problem, SETTINGS[0], steps=0))
    assert all(torch.equal(w, b) for w, b in zip(problem.weights, before))


@pytest.mark.parametrize("exact", [False, True])
def test_where_the_weights_do_not_matter_only_the_direct_gradient_is_left(exact):
    weight, alpha = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    _, [flat] = second_order(
        lambda: (weight * alpha).sum(), lambda: alpha.square().sum(), [alpha], optimizer, exact=exact
    )
    assert flat.item() == 4
    _, [apart] = second_order(
        lambda: weight.square().sum(), lambda: (weight * alpha).sum(), [alpha], optimizer, exact=exact
    )
    assert apart.item() == pytest.approx(2 * (1 - 0.2))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
        lambda p: torch.optim.Adam(p, lr=0.1),
    ],
)
def test_other_steps_are_refused(optimizer):
    problem = Smooth()
    with pytest.raises(UserError, match="SGD without dampening"):
        second_order(problem.train, problem.val, problem.alphas, optimizer(problem.weights))


# The solvable example of DARTS (section 2.3, figure 2): L_val = alpha w - 2 alpha + 1,
# L_train = w^2 - 2 alpha w + alpha^2, so w*(alpha) = alpha, L_val(w*, alpha) = (alpha - 1)^2, alpha* = w* = 1.
STARTS = [(2.0, -2.0), (-3.0, 4.0), (0.0, 0.0), (5.0, 1.0)]


def scalar(value):
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def val_loss(alpha, w):
    return lambda: alpha * w - 2 * alpha + 1


def train_loss(alpha, w):
    return lambda: w.square() - 2 * alpha * w + alpha.square()


def search(start, xi, order):
    alpha, w = scalar(start[0]), scalar(start[1])
    weights = torch.optim.SGD([w], lr=xi)
    architecture = torch.optim.SGD([alpha], lr=0.5)
    train, val = train_loss(alpha, w), val_loss(alpha, w)
    for _ in range(40):
        _, slopes = first_order(val, [alpha]) if order == 1 else second_order(train, val, [alpha], weights)
        set_gradients([alpha], slopes)
        architecture.step()
        weights.zero_grad()
        train().backward()
        weights.step()
    return alpha.item(), w.item()


@pytest.mark.parametrize("start", STARTS)
def test_on_darts_example_first_order_misses_and_second_order_finds_the_solution(start):
    """First order rests where w = 2 (and w = alpha): at 2. A step of xi = .5 solves the inner level at once."""
    assert search(start, 0.3, 1) == pytest.approx((2, 2), abs=1e-6)
    assert search(start, 0.5, 2) == pytest.approx((1, 1), abs=1e-6)


@pytest.mark.parametrize("xi", [0.2, 0.3, 0.4])
def test_on_darts_example_shorter_unrolled_steps_rest_between(xi):
    """d/dalpha L_val(w - xi (2 w - 2 alpha), alpha) vanishes on w = alpha where alpha = 2 / (1 + 2 xi)."""
    assert search((2.0, -2.0), xi, 2) == pytest.approx((2 / (1 + 2 * xi),) * 2, abs=1e-6)


def relaxed(start, factor, steps):
    """RARTS with train_weight = coupling = factor; the rates follow the curvature of the penalties."""
    alpha, w, y = scalar(start[0]), scalar(start[1]), scalar(start[1])
    optimizers = [torch.optim.SGD([p], lr=lr / factor, momentum=0.5) for p, lr in ((w, 0.4), (y, 0.3), (alpha, 0.6))]
    for _ in range(steps):
        relaxed_step(train_loss(alpha, w), val_loss(alpha, y), *optimizers, train_weight=factor, coupling=factor)
    return alpha.item(), w.item(), y.item()


@pytest.mark.parametrize("start", STARTS)
def test_on_darts_example_rarts_finds_the_solution(start):
    """Without second derivatives; the penalties leave alpha = 1 / (1 - 1/(4 lambda) - 1/(2 beta)), 1.5 % off at 50."""
    alpha, w, y = relaxed(start, 50.0, 140)
    assert alpha == pytest.approx(1 / (1 - 1 / 200 - 1 / 100), abs=1e-4)
    assert (alpha, w, y) == pytest.approx((1, 1, 1), abs=0.03)


def test_rarts_approaches_the_solution_as_its_factors_grow():
    found = [relaxed((2.0, -2.0), factor, 120)[0] for factor in (2.0, 6.0, 18.0)]
    assert found == pytest.approx([1 / (1 - 0.75 / factor) for factor in (2.0, 6.0, 18.0)], abs=1e-3)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_relaxed_step_is_three_descents_in_turn(clip):
    """Against the same three steps written out on the whole objective with its own gradients."""
    problem, other = Smooth(5), Smooth(6)
    other.alphas, factor, coupling, rate = problem.alphas, 1.7, 0.6, 0.05
    w, y = [[p.detach().clone() for p in q.weights] for q in (problem, other)]
    alphas = [a.detach().clone() for a in problem.alphas]

    def objective():
        tie = sum((a - b).square().sum() for a, b in zip(y, w))
        return other.value("val", y, alphas) + factor * problem.value("train", w, alphas) + coupling / 2 * tie

    for group in (w, y, alphas):
        for p in group:
            p.requires_grad_()
        slopes = torch.autograd.grad(objective(), group)
        norm = math.sqrt(sum(slope.square().sum().item() for slope in slopes))
        if clip is not None and group is not alphas:
            assert norm > clip
            slopes = [slope * clip / norm for slope in slopes]
        for p, slope in zip(group, slopes):
            p.requires_grad_(False).sub_(rate * slope)
    optimizers = [torch.optim.SGD(p, lr=rate) for p in (problem.weights, other.weights, problem.alphas)]
    losses = relaxed_step(problem.train, other.val, *optimizers, train_weight=factor, coupling=coupling, clip=clip)
    for found, expected in zip([*problem.weights, *other.weights, *problem.alphas], [*w, *y, *alphas]):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5 if clip else 1e-12, atol=1e-7 if clip else 1e-14)
    assert all(math.isfinite(loss.item()) and not loss.requires_grad for loss in losses)


def test_relaxed_steps_refuse_what_does_not_fit():
    problem, other = Smooth(), Smooth()
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in (problem.weights, other.weights[:2], problem.alphas)]
    with pytest.raises(UserError, match="3 and 2 weights"):
        relaxed_step(problem.train, other.val, *optimizers, train_weight=1.0, coupling=1.0)
    with pytest.raises(UserError, match="positive"):
        relaxed_step(problem.train, other.val, *optimizers, train_weight=1.0, coupling=0.0)
