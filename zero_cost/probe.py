"""The shared pass: one forward of the first batch, one backward to the weights, one to the input, one second order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from zero_cost.captured import ChannelSaliency, Codes, Named, Probe
from zero_cost.errors import NoValue
from zero_cost.static import static_costs
from zero_cost.watch import (
    CONVOLUTION_CALLS,
    EMBEDDING_CALLS,
    LINEAR_CALLS,
    Watch,
    argument,
    changes_in_place,
    is_relu,
    reachable,
)

FORWARD = ("logits", "codes", "features")
LOSS_BACKWARD = ("gradients", "fisher", "second_order", "batch_gradients")
SHARED = (*FORWARD, *LOSS_BACKWARD, "jacobian", "live_codes")


def common_units(signs: torch.Tensor) -> torch.Tensor:
    """[B, B] exact float64 counts of the columns where two rows of int8 zeros and ones are both 1."""
    if signs.device.type == "cpu" and hasattr(torch, "_int_mm"):
        return torch._int_mm(signs, signs.T).double()  # several times as fast as float32 on a CPU
    both = torch.zeros(len(signs), len(signs), dtype=torch.float64, device=signs.device)
    for part in signs.split(1 << 23, 1):  # whole numbers below 2^24 are exact in float32
        both += (part.float() @ part.float().T).double()
    return both


class Observer:
    """Handler of a Watch: signs of ReLU inputs, outputs of weighted layers with their gradients, first embedding."""

    def __init__(self, probe: Probe, samples: int):
        self.codes, self.fisher = probe.wants("codes"), probe.wants("fisher")
        self.samples, self.few = samples, min(samples, probe.few)
        self.agreements: list[torch.Tensor] = []
        self.units: list[int] = []
        self.nodes: list[Any] = []
        self.patterns: list[torch.Tensor] = []
        self.embedded: torch.Tensor | None = None
        self.in_loss_backward = False
        self.saliencies: list[ChannelSaliency] = []
        self.broken: str | None = None
        self._kept: dict[int, list[Any]] = {}  # id of a layer's output -> [output or its copy, version]
        self._buffer = torch.empty(0, dtype=torch.int8)
        self._handles: list[Any] = []

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._kept and args and id(args[0]) in self._kept and changes_in_place(func, args, kwargs):
            self._kept[id(args[0])][:2] = args[0].detach().clone(), None
        see = self.codes and is_relu(func, args, kwargs)
        if see:  # before the call, which may overwrite its input
            see = self._see(argument("input", 0, args, kwargs).detach())
        result = func(*args, **kwargs)
        if see:
            self.nodes.append(result.grad_fn)
        if self.fisher and result is not None and (func in CONVOLUTION_CALLS or func in LINEAR_CALLS):
            self._follow(result, argument("weight", 1, args, kwargs), func in LINEAR_CALLS)
        if func in EMBEDDING_CALLS and self.embedded is None:
            self.embedded = result
        return result

    def _see(self, x: torch.Tensor) -> bool:
        if x.dim() < 2 or x.shape[0] % self.samples:
            return False  # not laid out by sample
        with torch.no_grad():
            count = x.numel() // self.samples
            if self._buffer.numel() < x.numel() or self._buffer.device != x.device:
                self._buffer = torch.empty(x.numel(), dtype=torch.int8, device=x.device)
            signs = self._buffer[: x.numel()].view(self.samples, count)
            torch.gt(x.reshape(self.samples, count), 0, out=signs)
            both = common_units(signs)
            active = both.diagonal()  # a sample agrees with itself in every active unit
            self.agreements.append(2 * both + count - active[:, None] - active[None, :])
            self.units.append(count)
            if x.dim() >= 4:
                bits = 2.0 ** torch.arange(min(self.few, 24), device=x.device)
                self.patterns.append((bits @ signs[: len(bits)].float()).to(torch.int32))
        return True

    def _follow(self, output: torch.Tensor, weight: torch.Tensor, channels_last: bool) -> None:
        if not output.requires_grad:
            return
        kept: list[Any] = [
            output.detach(),
            output._version,
            output,
        ]  # the output itself stays, so that its id stays its own
        self._kept[id(output)] = kept

        def hook(gradient: torch.Tensor) -> None:
            if not self.in_loss_backward:
                return
            with torch.no_grad():
                value, version, original = kept
                if version is not None and original._version != version:
                    self.broken = "an activation was overwritten through a view"
                product = value * gradient.detach()
                if channels_last:
                    sums = product.reshape(len(product), -1, product.shape[-1]).sum(1)
                else:
                    sums = product.flatten(2).sum(2)
                self.saliencies.append(ChannelSaliency(0.5 * sums.square().mean(0), weight.numel() // sums.shape[1]))

        self._handles.append(output.register_hook(hook))

    def close(self) -> None:
        """Take the hooks away: outputs, their graph and the hooks hold each other, which nothing else would free."""
        for handle in self._handles:
            handle.remove()

    def result(self, logits: torch.Tensor) -> Codes:
        """The codes; `live` needs the graph of `logits`."""
        reached = reachable(logits)
        empty = torch.empty(0, dtype=torch.int32, device=logits.device)
        return Codes(
            self.agreements, self.units, [node in reached for node in self.nodes], torch.cat([empty, *self.patterns]),
            self.few,
        )  # fmt: skip


def static_pass(probe: Probe) -> None:
    """P0: counts and weights, no arithmetic."""
    if probe.wants("static"):
        with probe.step("static", "static"):
            probe.captured.static = static_costs(probe.network.model, probe.batches[0][0], probe.network.output)
    probe.captured.params = sum(p.numel() for p in probe.network.model.parameters() if p.requires_grad)
    probe.captured.weights = {name: w.detach() for name, w in probe.network.weights.items()}


def shared_pass(probe: Probe) -> None:
    """P1 to P4 on the first batch, each only as far as something wanted needs it; gradients of the other batches."""
    if not probe.wants(*SHARED):
        return
    observer = Observer(probe, len(probe.batches[0][0]))
    try:
        _shared_pass(probe, observer)
    finally:
        observer.close()


def _shared_pass(probe: Probe, observer: Observer) -> None:
    captured, network = probe.captured, probe.network
    inputs, labels = probe.batches[0]
    graph = probe.wants(*LOSS_BACKWARD, "jacobian", "live_codes")
    leaf = inputs.detach()
    with contextlib.ExitStack() as stack:
        stack.enter_context(probe.step("forward", *SHARED))
        stack.enter_context(torch.set_grad_enabled(graph))
        if probe.wants("features"):
            captured.features = stack.enter_context(_leaf_features(network.model))
        if probe.wants("jacobian") and inputs.is_floating_point():
            leaf.requires_grad_()
        with Watch(observer):
            logits = network.forward(leaf.clone())
        captured.logits = logits.detach()
        if observer.codes:
            captured.codes = observer.result(logits)
    if not hasattr(captured, "logits"):
        return
    if probe.wants(*LOSS_BACKWARD):
        gradients = _loss_backward(probe, observer, logits, labels)
    if probe.wants("jacobian"):
        with probe.step("input backward", "jacobian"):
            captured.jacobian = _jacobian(logits, leaf, observer.embedded, probe.wants("second_order"))
    if probe.wants("second_order"):
        with probe.step("second order", "second_order"):
            captured.second_order = _hessian_gradient(gradients, network.weights)
    if probe.wants("batch_gradients"):
        with probe.step("other batches", "batch_gradients"):
            captured.batch_gradients = [captured.gradients, *_other_batches(probe)]


def _loss_backward(probe: Probe, observer: Observer, logits: torch.Tensor, labels: torch.Tensor | None) -> Named:
    gradients: Named = {}
    with probe.step("loss backward", *LOSS_BACKWARD):
        loss = probe.loss_of(logits, labels)
        observer.in_loss_backward = True
        second = probe.wants("second_order")
        gradients = _gradients(loss, probe.network.weights, second or probe.wants("jacobian"), second)
        probe.captured.gradients = {name: g.detach() for name, g in gradients.items()}
        probe.captured.fisher = observer.saliencies
        if observer.broken:
            probe.failed["fisher"] = observer.broken
    observer.in_loss_backward = False
    return gradients


def _gradients(loss: torch.Tensor, weights: Named, retain: bool = False, create: bool = False) -> Named:
    """dL/dW by name; zeros for weights that the loss does not depend on."""
    if not weights:
        raise NoValue("the model has no weights of convolutions or linear layers")
    if not loss.requires_grad:
        raise NoValue("the loss does not depend on the weights")
    found = torch.autograd.grad(
        loss, list(weights.values()), retain_graph=retain, create_graph=create, allow_unused=True
    )
    return {name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), found, strict=True)}


def _jacobian(logits: torch.Tensor, leaf: torch.Tensor, embedded: torch.Tensor | None, retain: bool) -> torch.Tensor:
    place = leaf if leaf.requires_grad else embedded
    if place is None:
        raise NoValue("integer inputs that no embedding reads have no gradient")
    (gradient,) = torch.autograd.grad(logits.sum(), [place], retain_graph=retain, allow_unused=True)
    if gradient is None:
        raise NoValue("the output does not depend on the input")
    return gradient.reshape(len(leaf), -1)


def _hessian_gradient(gradients: Named, weights: Named) -> Named:
    """H g, by a backward pass through <g, constant g>."""
    product = sum((g.detach() * g).sum() for g in gradients.values() if g.requires_grad)
    if not isinstance(product, torch.Tensor):
        raise NoValue("the gradient does not depend on the weights")
    return {name: g.detach() for name, g in _gradients(product, weights).items()}


def _other_batches(probe: Probe) -> Iterator[Named]:
    for inputs, labels in probe.batches[1:]:
        with torch.enable_grad():
            loss = probe.loss_of(probe.network.forward(inputs.detach().clone()), labels)
            yield _gradients(loss, probe.network.weights)


@contextlib.contextmanager
def _leaf_features(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that fills with sample 0 of every leaf module's feature map, [C, positions]; containers are not leaves,
    so that no map is seen twice."""
    found: list[torch.Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.dim() >= 3:
            found.append(output[0].detach().flatten(1).clone())  # a copy: the next call may overwrite it

    handles = [m.register_forward_hook(hook) for m in model.modules() if next(m.children(), None) is None]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
