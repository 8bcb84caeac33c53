"""P5: the network with absolute weights on an input of ones, without normalisation, in float64."""

from __future__ import annotations

import torch

from zero_cost.captured import Probe, Synflow
from zero_cost.errors import NoValue
from zero_cost.watch import Watch, without_norms


def synflow_pass(probe: Probe) -> None:
    """R = sum of the outputs for one sample of ones (token 1 for integer inputs); with `synflow` also dR/dW."""
    if not probe.wants("synflow", "synflow_forward"):
        return
    network, backward = probe.network, probe.wants("synflow")
    names = ("synflow", "synflow_forward") if backward else ("synflow_forward",)
    with probe.step("synflow", *names), torch.set_grad_enabled(backward):
        # float64: R passes 1e38 on ordinary networks.
        parameters = {name: p.detach().double().abs() for name, p in network.parameters.items()}
        weights = [parameters[name].requires_grad_(backward) for name in network.weights]
        like = probe.batches[0][0][:1]
        ones = torch.ones_like(like, dtype=torch.float64 if like.is_floating_point() else like.dtype)
        with Watch(without_norms):
            total = network.forward(ones, parameters, torch.float64).sum()
        value = total.detach().log().item()
        if backward:
            if not total.requires_grad:
                raise NoValue("the output does not depend on the weights")
            found = torch.autograd.grad(total, weights, allow_unused=True)
            gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
            probe.captured.synflow = Synflow([w.detach() for w in weights], gradients)
        probe.captured.synflow_forward = value
