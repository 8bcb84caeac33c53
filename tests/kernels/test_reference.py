"""The reference executor: dtypes, memory formats, errors, and what torch may do to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.autodiff import differentiate
from kernels.lower import lower
from kernels.nodes import FULL, K, S, shape_of
from kernels.program import Builder
from kernels.reference import execute, from_program, to_program
from search_spaces.common.errors import UserError
from search_spaces.layers import catalog
from search_spaces.layers.evaluate import evaluate
from search_spaces.layers.module import GraphLayer


@pytest.mark.parametrize("layout", ["channels-first", "tokens"])
@pytest.mark.parametrize("flat", [False, True])
def test_layouts_go_to_programs_and_back(layout, flat):
    for shape in [(2, 3, 4), *([] if layout == "tokens" else [(2, 3), (2, 3, 4, 5), (2, 3, 4, 5, 6)])]:
        x = torch.randn(shape)
        inside = to_program(x, layout, flat)
        channels = shape[-1] if layout == "tokens" else shape[1]
        assert (
            inside.shape == (x.numel() // channels, channels, 1) if flat else (2, channels, x.numel() // channels // 2)
        )
        assert torch.equal(from_program(inside, shape, layout, flat), x)
        by_channel = x.movedim(-1 if layout == "tokens" else 1, 0).flatten(1)
        torch.testing.assert_close(inside.movedim(1, 0).flatten(1), by_channel)
    with pytest.raises(UserError, match="a layout"):
        to_program(torch.ones(2, 3), "nhwc", flat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    lowered = lower(catalog.layer("evonorm-b0"))
    derivative = differentiate(lowered.program, ("x", *lowered.parameters))
    x = (torch.randn(4, 8, 300, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)  # squares leave float16
    params = {name: torch.full((8,), float(name != "bias")) for name in lowered.parameters}
    forward = execute(derivative.forward, {"x": x, **params})
    backward = execute(derivative.backward, {"x": x, "dy": x, **params, **forward})
    assert forward["y"].dtype == backward["dx"].dtype == dtype
    assert forward["moment_0"].dtype == backward["dv1"].dtype == torch.float32
    wide = {name: value.double() for name, value in {"x": x, "dy": x, **params}.items()}
    exact = execute(derivative.forward, wide)
    torch.testing.assert_close(forward["moment_0"].double(), exact["moment_0"], rtol=1e-5, atol=0)
    torch.testing.assert_close(forward["y"].double(), exact["y"], rtol=torch.finfo(dtype).eps, atol=1e-3)
    torch.testing.assert_close(
        forward["y"], GraphLayer(catalog.layer("evonorm-b0"), 8)(x).detach(), rtol=1e-2, atol=1e-2
    )


def test_a_mean_far_above_the_deviation():
    x = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0)) + 3e4
    program = lower(catalog.layer("batch-norm", affine=False)).program
    exact = execute(program, {"x": x.double()})
    torch.testing.assert_close(execute(program, {"x": x})["moment_1"].double(), exact["moment_1"], rtol=1e-3, atol=0)


def test_strided_and_expanded_tensors():
    graph = catalog.layer("gn-silu", groups=2)
    lowered = lower(graph)
    derivative = differentiate(lowered.program, ("x", *lowered.parameters))
    params = {name: torch.randn(4, dtype=torch.float64) for name in lowered.parameters}
    x = torch.randn(2, 6, 5, 8, dtype=torch.float64)[:, 1:5, :, ::2].to(memory_format=torch.channels_last)
    dy = torch.randn(1, 1, 1, dtype=torch.float64).expand(2, 4, 20)
    inside = to_program(x, "channels-first", False)
    forward = execute(derivative.forward, {"x": inside, **params}, groups=2)
    torch.testing.assert_close(forward["y"].reshape(x.shape), evaluate(graph, x, params))
    given = {"x": inside, **params, **forward}
    strided = execute(derivative.backward, {**given, "dy": dy}, groups=2)
    dense = execute(derivative.backward, {**given, "x": inside.clone(), "dy": dy.clone()}, groups=2)
    for name in strided:
        torch.testing.assert_close(strided[name], dense[name])


def test_every_saved_value_has_the_shape_of_its_space():
    for name in ("evonorm-b0", "layer-norm", "group-norm", "instance-norm", "layer-norm-tokens"):
        lowered = lower(catalog.layer(name))
        forward = differentiate(lowered.program, ("x",)).forward
        params = {name: torch.ones(12) for name in lowered.parameters}
        found = execute(forward, {"x": torch.randn(2, 12, 5), **params}, groups=3)
        for output, at in forward.outputs:
            assert found[output].shape == shape_of(forward.spaces[at], 2, 3, 4, 5)


def test_autograd_follows_the_executor_to_the_same_gradients():
    lowered = lower(catalog.layer("evonorm-b0"))
    derivative = differentiate(lowered.program, ("x", *lowered.parameters))
    inputs = {name: torch.randn(4, dtype=torch.float64) for name in lowered.parameters}
    inputs["x"] = torch.randn(3, 4, 5, dtype=torch.float64)
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    forward = execute(derivative.forward, inputs)
    dy = torch.randn(3, 4, 5, dtype=torch.float64)
    by_torch = torch.autograd.grad(forward["y"], list(inputs.values()), dy)
    given = {name: value.detach() for name, value in {**inputs, **forward, "dy": dy}.items()}
    by_program = execute(derivative.backward, given)
    for name, gradient in zip(inputs, by_torch, strict=True):
        torch.testing.assert_close(by_program[f"d{name}"], gradient, rtol=1e-10, atol=1e-12)


def test_it_can_be_exported_with_a_free_batch():
    lowered = lower(catalog.layer("evonorm-b0"), training=False)

    class Layer(torch.nn.Module):
        def forward(self, x, weight, bias, v1, moment):
            given = {"x": x.flatten(2), "weight": weight, "bias": bias, "v1": v1, "moment_0": moment}
            return execute(lowered.program, given)["y"].reshape(x.shape)

    vector = torch.rand(4) + 0.5
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Layer(), (torch.randn(3, 4, 5, 5), *[vector] * 4), dynamic_shapes=({0: batch}, None, None, None, None)
    )
    x = torch.randn(7, 4, 5, 5)
    torch.testing.assert_close(program.module()(x, *[vector] * 4), Layer()(x, *[vector] * 4))


def test_empty_batches_have_empty_outputs():
    program = lower(catalog.layer("layer-norm", affine=False)).program
    assert execute(program, {"x": torch.zeros(0, 4, 5)})["y"].shape == (0, 4, 5)


def test_inputs_are_checked():
    program = lower(catalog.layer("silu")).program
    x, vector = torch.ones(2, 3, 4), torch.ones(3)
    good = {"x": x, "weight": vector, "bias": vector, "v1": vector}
    for change, expected in [
        ({"x": torch.ones(2, 3)}, "rank 3 over NGKS"),
        ({"x": torch.ones(2, 3, 4, dtype=torch.long)}, "floating-point"),
        ({"v1": torch.ones(4)}, "as in x"),
        ({"v1": torch.ones(1)}, "as in x"),
        ({"v1": torch.ones(3, 1)}, "rank 1 over GK"),
    ]:
        with pytest.raises(UserError, match=expected):
            execute(program, {**good, **change})
    with pytest.raises(UserError, match="a tensor for each input"):
        execute(program, {"x": x, "weight": vector, "bias": vector})
    with pytest.raises(UserError, match="groups that divides"):
        execute(program, good, groups=2)
    assert execute(program, good, groups=3)["y"].shape == x.shape


def test_variances_are_numpys():
    builder = Builder()
    program = builder.program({"v": builder.var(builder.input("x", FULL), K | S)})
    x = np.random.default_rng(0).normal(size=(3, 6, 5)) + 100
    found = execute(program, {"x": torch.from_numpy(x)}, groups=2)["v"]
    np.testing.assert_allclose(found.numpy(), x.reshape(3, 2, -1).var(-1), rtol=1e-12)
