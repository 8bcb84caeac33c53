"""P6: gradients of each sample, without a pass per sample where samples do not meet, and with one where they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from zero_cost.captured import Named, Probe
from zero_cost.errors import NoValue
from zero_cost.watch import BATCH_NORM_CALLS, CONVOLUTION_CALLS, EMBEDDING_CALLS, LINEAR_CALLS, Watch, argument


def sign_sums_pass(probe: Probe) -> None:
    """GradSign's sums over the first samples, each forwarded by itself.

    A batch of one turns BatchNorm into the normalisation of each map by itself; so done, samples share a forward and a
    backward, and a layer's per-sample gradients are one batched product of its unfolded inputs and its cotangents.
    """
    if not probe.wants("sign_sums"):
        return
    with probe.step("per-sample gradients", "sign_sums"), torch.enable_grad():
        inputs, labels = probe.batches[0]
        inputs = inputs[: probe.few]
        weights = {name: w.detach() for name, w in probe.network.weights.items()}
        if not weights:
            raise NoValue("the model has no weights of convolutions or linear layers")
        watched = _SampleGradients(weights, len(inputs))
        leaf = inputs.detach()
        if leaf.is_floating_point():
            watched.leaf = leaf.requires_grad_()
        parameters = {name: p.detach() for name, p in probe.network.parameters.items()} | weights
        with Watch(watched):
            logits = probe.network.forward(leaf.clone(), parameters)
        # A common factor of all samples' losses does not change a sign.
        loss = probe.loss_of(logits, None if labels is None else labels[: probe.few])
        if watched.leaf is None or not loss.requires_grad:
            raise NoValue("the output does not depend on the input")
        torch.autograd.grad(loss, [watched.leaf], allow_unused=True)
        probe.captured.sign_sums = {name: total.item() for name, total in watched.totals.items()}


class _SampleGradients:
    """Handler of a Watch that sums signs of per-sample gradients as the backward pass reaches the layers."""

    def __init__(self, weights: Named, samples: int):
        self.names = {id(w): name for name, w in weights.items()}
        self.samples = samples
        self.leaf: torch.Tensor | None = None
        self.uses: Counter[str] = Counter()
        self.gradients: Named = {}
        self.totals: Named = {}

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in BATCH_NORM_CALLS:
            x, weight = args[0], argument("weight", 3, args, kwargs)
            if x.dim() == 2:
                raise NoValue("BatchNorm over single samples without positions has no variance")
            eps = argument("eps", 7, args, kwargs, 1e-5)
            return F.instance_norm(x, None, None, weight, argument("bias", 4, args, kwargs), True, 0.1, eps)
        result = func(*args, **kwargs)
        if func in EMBEDDING_CALLS and self.leaf is None:
            self.leaf = result = result.detach().requires_grad_()
        elif func in CONVOLUTION_CALLS or func in LINEAR_CALLS:
            name = self.names.get(id(argument("weight", 1, args, kwargs)))
            if name is not None and result.requires_grad:
                self._follow(name, func, args, kwargs, result)
        return result

    def _follow(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        x = argument("input", 0, args, kwargs)
        version = x._version
        self.uses[name] += 1

        def hook(cotangent: torch.Tensor) -> None:
            if x._version != version:
                raise NoValue("the input of a layer was overwritten")
            with torch.no_grad():
                new = weight_gradients(func, args, kwargs, x.detach(), cotangent, self.samples)
            old = self.gradients.pop(name, None)
            total = new if old is None else old + new
            self.uses[name] -= 1
            if self.uses[name]:  # a shared layer: its other calls come later
                self.gradients[name] = total
            else:
                self.totals[name] = total.sign().sum(0).abs().sum(dtype=torch.float64)

        result.register_hook(hook)


def weight_gradients(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor, cotangent: torch.Tensor, samples: int
) -> torch.Tensor:
    """[samples, ...] gradients of a convolution's or linear layer's weight by sample, from its input and cotangent."""
    weight = argument("weight", 1, args, kwargs)
    if func in LINEAR_CALLS:
        x, cotangent = x.reshape(samples, -1, x.shape[-1]), cotangent.reshape(samples, -1, cotangent.shape[-1])
        return cotangent.transpose(1, 2) @ x
    stride = argument("stride", 3, args, kwargs, 1)
    padding = argument("padding", 4, args, kwargs, 0)
    dilation = argument("dilation", 5, args, kwargs, 1)
    groups = argument("groups", 6, args, kwargs, 1)
    if func is F.conv2d and not isinstance(padding, str):
        columns = F.unfold(x, weight.shape[2:], dilation, padding, stride)
        columns = columns.view(samples, groups, -1, columns.shape[-1])
        return cotangent.reshape(samples, groups, -1, columns.shape[-1]) @ columns.transpose(2, 3)

    def one(x: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
        def call(weight: torch.Tensor) -> torch.Tensor:
            return func(x[None], weight, None, *args[3:], **{k: v for k, v in kwargs.items() if k in CONVOLUTION_SHAPE})

        return torch.func.vjp(call, weight)[1](cotangent[None])[0]

    return torch.stack([one(*pair) for pair in zip(x, cotangent, strict=True)])


CONVOLUTION_SHAPE = ("stride", "padding", "dilation", "groups", "output_padding")


def ntk_pass(probe: Probe) -> None:
    """The empirical kernel of the first samples: row n is the gradient of sample n's summed logits, all samples in one
    forward (BatchNorm couples them), a backward pass for each; the Gram matrix in float64."""
    if not probe.wants("ntk"):
        return
    with probe.step("ntk", "ntk"), torch.enable_grad():
        inputs = probe.batches[0][0][: probe.few]
        weights = list(probe.network.weights.values())
        logits = probe.network.forward(inputs.detach().clone())
        if not weights or not logits.requires_grad:
            raise NoValue("the output does not depend on the weights")
        rows = []
        for one in logits:
            found = torch.autograd.grad(one.sum(), weights, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([g.flatten() for g in found if g is not None]))
        gradients = torch.stack(rows).double()
        probe.captured.ntk = gradients @ gradients.T
