"""Stacked layers against torch.nn with the same weights, member by member."""

import pytest
import torch
from torch import nn

from predictors.neural import layers

STACK, WIDTH = 3, 8


def generators(seeds=(5, 6, 7)):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(module):
    layers.initialize(module, generators())
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_one_linear_per_member(bias):
    stacked = drawn(layers.Linear(STACK, WIDTH, 5, bias=bias))
    x = torch.randn(STACK, 4, 2, WIDTH)
    found = stacked(x)
    for k in range(STACK):
        alone = nn.Linear(WIDTH, 5, bias=bias)
        alone.weight.data = stacked.weight[k].T
        if bias:
            alone.bias.data = stacked.bias[k, 0]
        torch.testing.assert_close(found[k], alone(x[k]))


@pytest.mark.parametrize(("init", "bound"), [("torch", 16**-0.5), ("xavier", (6 / 80) ** 0.5)])
def test_linear_is_drawn_uniformly_within_its_bound(init, bound):
    weight = drawn(layers.Linear(STACK, 16, 64, init=init)).weight
    assert 0.95 * bound < weight.abs().max().item() <= bound
    assert weight.var().item() == pytest.approx(bound**2 / 3, rel=0.1)


def test_embedding_looks_up_its_own_member_and_has_a_padding_row():
    stacked = drawn(layers.Embedding(STACK, 4, WIDTH))
    ids = torch.randint(0, 5, (STACK, 6, 7))
    found = stacked(ids)
    assert stacked.weight.shape == (STACK, 5, WIDTH)
    for k in range(STACK):
        torch.testing.assert_close(found[k], nn.functional.embedding(ids[k], stacked.weight[k]))


def test_layer_norm_and_prelu():
    norm, act = layers.LayerNorm(STACK, WIDTH), layers.PReLU(STACK)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        act.slope.uniform_()
    x = torch.randn(STACK, 4, 2, WIDTH)
    for k in range(STACK):
        expected = nn.functional.layer_norm(x[k], (WIDTH,), norm.weight[k], norm.bias[k])
        torch.testing.assert_close(norm(x)[k], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(act(x)[k], nn.functional.prelu(x[k], act.slope[k, None]))


def test_batch_norm_is_torchs_on_the_real_nodes_alone():
    stacked = layers.MaskedBatchNorm(STACK, WIDTH)
    with torch.no_grad():
        stacked.weight.normal_()
        stacked.bias.normal_()
    alone = [nn.BatchNorm1d(WIDTH) for _ in range(STACK)]
    for k, norm in enumerate(alone):
        norm.weight.data, norm.bias.data = stacked.weight[k, 0, 0].detach(), stacked.bias[k, 0, 0].detach()
    for _ in range(3):
        x = torch.randn(STACK, 5, 4, WIDTH) * 3 + 1
        mask = (torch.rand(STACK, 5, 4) < 0.7).float()
        found = stacked(x, mask)
        for k, norm in enumerate(alone):
            real = mask[k] > 0
            torch.testing.assert_close(found[k][real], norm(x[k][real]), rtol=1e-4, atol=1e-5)
    stacked.eval()
    found = stacked(x, mask)
    for k, norm in enumerate(alone):
        torch.testing.assert_close(
            found[k].reshape(-1, WIDTH), norm.eval()(x[k].reshape(-1, WIDTH)), rtol=1e-4, atol=1e-5
        )


def test_gradients_of_batch_norm_against_finite_differences():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 3, 4) < 0.7).double()
    norm = layers.MaskedBatchNorm(2, 5).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()

    def run(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, mask))

    assert torch.autograd.gradcheck(run, (x, norm.weight, norm.bias))


def test_linear_of_sums_of_few_rows():
    linear = drawn(layers.Linear(STACK, 2 * WIDTH, 5))
    rows, counts = torch.randn(STACK, 4, WIDTH), torch.randint(0, 3, (STACK, 6, 7, 8)).float()
    sums = torch.cat([torch.einsum("sbnc,scd->sbnd", part, rows) for part in counts.split(4, 3)], 3)
    torch.testing.assert_close(linear.of_sums(counts, rows), linear(sums), rtol=1e-4, atol=1e-4)


def test_dropout_of_a_member_does_not_depend_on_the_others():
    x = torch.ones(STACK, 50, 40)
    stacked, alone = layers.Dropout(0.3), layers.Dropout(0.3)
    layers.use_generators(stacked, generators())
    layers.use_generators(alone, generators((6,)))
    found = stacked(x)
    assert torch.equal(found[1:2], alone(x[1:2]))
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (found == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(stacked.eval()(x), x)


def test_dropout_without_generators_is_refused():
    with pytest.raises(RuntimeError, match="generators"):
        layers.Dropout(0.3)(torch.ones(1, 2, 3))
