"""Transformers rewritten for RMSNorm and CRMSNorm, and weights projected to their norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from search_spaces.common.errors import UserError
from search_spaces.primitives.norms import RMSNorm
from search_spaces.primitives.recentring import recentre_, to_crms_norms, to_rms_norms
from search_spaces.primitives.transformer_norms import CRMSNorm
from search_spaces.primitives.weight_projection import ProjectWeights


class Block(nn.Module):
    def __init__(self, width: int, affine: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=affine) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * 12, bias=affine), nn.Linear(12, width)
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width, bias=affine)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(a)
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, affine: bool = True, width: int = 10):
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList([Block(width, affine) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


WRITERS = ["embedding", "position", *(f"blocks.{i}.{n}" for i in range(3) for n in ("out", "down"))]
READERS = {f"blocks.{i}.norm{k}": [f"blocks.{i}.{n}"] for i in range(3) for k, n in ((1, "qkv"), (2, "up"))}
READERS["norm"] = ["head"]


def transformer(affine: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Transformer(affine)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("affine", [True, False])
def test_rewritten_transformers_compute_the_same(affine):
    model = transformer(affine)
    tokens = torch.randint(0, 7, (3, 5))
    expected = model(tokens)
    rms = to_rms_norms(model, WRITERS, READERS)
    crms = to_crms_norms(model, WRITERS, READERS)
    assert (rms(tokens) - expected).abs().max() < 1e-5
    assert (crms(tokens) - expected).abs().max() < 1e-5
    assert torch.equal(model(tokens), expected)  # the given model is left alone
    for rewritten, kind in ((rms, RMSNorm), (crms, CRMSNorm)):
        assert not any(isinstance(m, nn.LayerNorm) for m in rewritten.modules())
        assert sum(isinstance(m, kind) for m in rewritten.modules()) == 7
    assert crms.position.shape == (1, 5, 9)
    assert crms.blocks[0].out.weight.shape == (9, 12)
    assert crms.blocks[0].qkv.weight.shape == (36, 9)
    assert "in_features=9" in repr(crms.head)


def test_a_writer_that_is_left_out_changes_the_function():
    model, tokens = transformer(True), torch.randint(0, 7, (3, 5))
    assert (to_rms_norms(model, WRITERS[:-1], READERS)(tokens) - model(tokens)).abs().max() > 1e-3


def test_recentred_layers_have_mean_zero_and_lose_nothing_else():
    torch.manual_seed(0)
    x, image = torch.randn(4, 6), torch.randn(2, 3, 5, 5)
    for layer, given, dim in ((nn.Linear(6, 8), x, -1), (nn.Conv2d(3, 8, 3), image, 1)):
        before = layer(given)
        recentre_(layer)
        expected = before - before.mean(dim, keepdim=True)
        torch.testing.assert_close(layer(given), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="Linear"):
        recentre_(nn.ReLU())


def test_names_must_fit():
    model = transformer(True)
    with pytest.raises(UserError, match="did you mean 'embedding'"):
        to_rms_norms(model, ["embeding"], READERS)
    with pytest.raises(UserError, match="LayerNorm"):
        to_rms_norms(model, WRITERS, ["head"])
    with pytest.raises(UserError, match="reads norm"):
        to_crms_norms(model, WRITERS, {"norm": ["embedding"]})


# -- weight projection ------------------------------------------------------------------------------------------------


def test_projection_keeps_norms_and_directions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(6), nn.Flatten(), nn.Linear(4 * 36, 5))
    project = ProjectWeights(model, exclude=["3.weight"])
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    optimiser.register_step_post_hook(project)
    initial = {name: p.detach().norm().item() for name, p in model.named_parameters()}
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        optimiser.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimiser.step()
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            stepped = old - p.grad
            if name == "0.weight":
                assert p.norm().item() == pytest.approx(initial[name], rel=1e-6)
                torch.testing.assert_close(p / p.norm(), stepped / stepped.norm())
            else:
                torch.testing.assert_close(p.detach(), stepped)


def test_projection_keeps_the_function_of_a_normalised_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8, eps=0.0))
    project, x = ProjectWeights(model), torch.randn(4, 6)
    with torch.no_grad():
        model[0].weight.mul_(7).add_(0.1)
    before = model(x)
    project()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_projection_state_and_zero_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[1].weight)
    project = ProjectWeights(model)
    assert set(project.state_dict()) == {"0.weight"}
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[0].weight.mul_(3)
    resumed = ProjectWeights(model, exclude=["1.weight"])
    resumed.load_state_dict(project.state_dict())
    resumed()
    torch.testing.assert_close(model[0].weight.norm(), project.norms["0.weight"])
    assert torch.equal(model[1].weight, torch.ones(2, 2))
    with pytest.raises(UserError, match="same parameters"):
        ProjectWeights(model).load_state_dict(project.state_dict())
    with pytest.raises(UserError, match="did you mean '0.weight'"):
        ProjectWeights(model, exclude=["0.weigth"])
