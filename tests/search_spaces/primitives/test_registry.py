"""The registry: complete, without duplicates; what fits is built into every image space, the rest says why not."""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from search_spaces import Choice, UserError, load_space, select
from search_spaces.layers.catalog import names
from search_spaces.primitives import registry
from search_spaces.primitives.primitive import KINDS, NEEDS
from search_spaces.primitives.registry import ACT, ACTIVATIONS, NORM, NORMS, act_factory, norm_factory, primitives

FOLDER = Path(registry.__file__).parent
SMALLEST = {
    "nas-bench-201": {"channels": 4, "cells_per_stage": 1},
    "nas-bench-101": {"channels": 8, "cells_per_stage": 1},
    "nats-size": {},
    "nas-bench-macro": {"channels": 4},
    "darts": {"channels": 4, "layers": 3},
}
FINDERS = {"norm": norm_factory, "act": act_factory}
PAIRS = [*itertools.product(["norm"], NORMS), *itertools.product(["act"], ACTIVATIONS)]


def test_every_file_is_in_the_registry_and_no_name_stands_twice():
    assigned = {
        path.stem
        for path in FOLDER.glob("*.py")
        for statement in ast.parse(path.read_text()).body
        if "PRIMITIVES" in {getattr(t, "id", "") for t in [getattr(statement, "target", None)]}
        or "PRIMITIVES" in {getattr(t, "id", "") for t in getattr(statement, "targets", [])}
    }
    assert assigned == set(registry.FILES)
    files = [importlib.import_module(f"search_spaces.primitives.{name}") for name in registry.FILES]
    listed = [each.name for file in files for each in file.PRIMITIVES]
    assert len(listed) == len(set(listed))
    assert [each.name for each in primitives()] == listed
    assert set(names()) <= {*listed, *(f"{name}-tokens" for name in ("layer-norm", "group-norm", "rms-norm"))}


def test_every_primitive_says_what_it_is():
    for each in primitives():
        assert each.name == each.name.lower().replace("_", "-").strip()
        assert each.kind in KINDS
        assert set(each.needs) <= set(NEEDS)
        assert each.formula
        assert len(each.source) > 10
    assert {each.kind for each in primitives()} == set(KINDS)
    assert sum(len(primitives(kind)) for kind in KINDS) == len(primitives())


def test_names_are_found_however_they_are_spelled_and_the_nearest_is_suggested():
    assert registry.primitive("CrReLU").name == registry.primitive("crrelu").name == "crrelu"
    assert norm_factory("Layer_Norm_2d").name == "layer-norm-2d"
    for find, wrong, close in (
        (norm_factory, "bachnorm", "batch-norm"),
        (act_factory, "geluu", "gelu"),
        (registry.primitive, "swigl", "swiglu"),
        (primitives, "normalization", "normalisation"),
    ):
        with pytest.raises(UserError) as caught:
            find(wrong)
        assert caught.value.suggestion == close


def test_looking_at_the_factories_imports_no_primitive_before_a_name_is_asked_for():
    code = (
        "import sys; from search_spaces.primitives.registry import NORMS, PrimitiveFactory; PrimitiveFactory('relu');"
        "assert 'search_spaces.primitives.kan' not in sys.modules; 'dyt' in NORMS;"
        "assert 'search_spaces.primitives.kan' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# By hand from the descriptions, not from the registry's rules.
REASONS = {
    ("act", "swiglu"): ("gives half", "silu"),
    ("act", "geglu"): ("gives half", "gelu"),
    ("norm", "glu"): ("gives half", "batch-norm"),
    ("norm", "sandwich"): ("residual", "batch-norm"),
    ("norm", "layer-norm-scaling"): ("residual", "ln-scaling"),
    ("norm", "region-norm-b"): ("mask", "region-norm-l"),
    ("norm", "transnormer-norm"): ("tokens", "rms-norm"),
    ("act", "skan"): ("tokens", "skan-shifted-softplus"),
    ("act", "eff-bottleneck"): ("block", "relu"),
    ("norm", "gelu"): ("activation", "batch-norm"),
    ("act", "dyt"): ("normalisation", "relu"),
    ("act", "bn-relu"): ("layer for both", "identity"),
}


@pytest.mark.parametrize(("place", "name"), REASONS)
def test_the_reason_and_an_alternative(place, name):
    reason, close = REASONS[place, name]
    with pytest.raises(UserError, match=reason) as caught:
        FINDERS[place](name)
    assert caught.value.suggestion == close


def test_everything_either_fits_or_says_why_and_alternatives_fit():
    for each in primitives():
        fits = {"norm": each.name in NORMS, "act": each.name in ACTIVATIONS}
        assert fits["norm"] or fits["act"] or each.kind in ("gate", "placement", "mixing") or "mask" in each.needs
        for place, find in FINDERS.items():
            if not fits[place]:
                with pytest.raises(UserError) as caught:
                    find(each.name)
                find(caught.value.suggestion)
    assert {"norm", "act"} == {p for p, _ in PAIRS}
    assert registry.misfit(registry.primitive("identity"), NORM) is None
    assert registry.misfit(registry.primitive("identity"), ACT) is None


@pytest.mark.parametrize(("place", "name"), PAIRS)
def test_what_fits_keeps_shapes_of_images_and_travels(place, name):
    factory = FINDERS[place](name)
    assert pickle.loads(pickle.dumps(factory)) == factory == {"norm": NORMS, "act": ACTIVATIONS}[place][name]
    module, x = factory(6), torch.randn(3, 6, 4, 5, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert module.eval()(x).shape == x.shape


def build(space_name: str, **layers) -> nn.Module:
    space = load_space(space_name)
    arch = space.sample(np.random.default_rng(3))
    return space.build(arch, num_classes=4, **SMALLEST[space_name], **layers)


@functools.cache
def sites(space_name: str) -> dict[str, int]:
    """How many times a space asks for each factory."""
    count = {"norm": 0, "act": 0}

    def counted(place: str):
        def make(channels: int) -> nn.Module:
            count[place] += 1
            return nn.Identity()

        return make

    with torch.device("meta"):
        build(space_name, norm=counted("norm"), act=counted("act"))
    return count


def uses(network: nn.Module, wanted: nn.Module) -> int:
    return sum(type(module) is type(wanted) for module in network.modules())


@pytest.mark.parametrize(("place", "name"), PAIRS)
def test_everything_that_fits_is_built_into_a_space(place, name):
    """The spaces take turns; the whole product is slow."""
    space_name = list(SMALLEST)[sum(map(ord, name)) % len(SMALLEST)]
    check_build(space_name, place, name)


@pytest.mark.slow
@pytest.mark.parametrize("space_name", SMALLEST)
@pytest.mark.parametrize(("place", "name"), PAIRS)
def test_everything_that_fits_is_built_into_every_space_and_runs(space_name, place, name):
    network = check_build(space_name, place, name, device="cpu")
    x = torch.randn(2, 3, 32, 32)
    torch.nn.functional.cross_entropy(network(x), torch.tensor([0, 1])).backward()
    assert network.eval()(x).shape == (2, 4)


def check_build(space_name: str, place: str, name: str, device: str = "meta") -> nn.Module:
    factory = FINDERS[place](name)
    with torch.device(device):
        network = build(space_name, **{place: factory})
        wanted = factory(8)
    assert sites(space_name)[place] > 0
    own = "Identity" if name == "identity" else type(wanted).__name__
    assert uses(network, wanted) >= sites(space_name)[place], own
    if place == "norm" and not isinstance(wanted, nn.BatchNorm2d) and not uses(wanted, nn.BatchNorm2d(2)):
        assert uses(network, nn.BatchNorm2d(2)) == 0
    return network


@pytest.mark.parametrize("space_name", SMALLEST)
def test_image_spaces_train_a_step_with_layers_of_each_sort(space_name):
    """A norm with a gradient of its own and an activation with parameters, a layer, a function of the sample."""
    for norm, act in (("power-norm", "xielu"), ("evonorm-b0", "identity"), ("rms-norm", "poly-norm")):
        torch.manual_seed(0)
        network = build(space_name, norm=norm_factory(norm), act=act_factory(act))
        out = network(torch.randn(2, 3, 16, 16))
        out.square().mean().backward()
        assert out.shape == (2, 4)
        assert out.isfinite().all()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_choice_of_primitives():
    choice = Choice([norm_factory(name)(5) for name in ("dyt", "unified-norm", "in-relu")], "norm")
    x = torch.randn(2, 5, 3, 3)
    for index, expected in enumerate(
        (torch.tanh(0.5 * x), None, nn.functional.relu(nn.functional.instance_norm(x, eps=1e-5)))
    ):
        select(choice, {"norm": index})
        if expected is not None:
            torch.testing.assert_close(choice(x), expected)
        assert choice(x).shape == x.shape
