"""Values against straightforward references: one proxy at a time, no sharing, from the formula."""

from __future__ import annotations

import proxy_references as reference
import pytest
import torch

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
