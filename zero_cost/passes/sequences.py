"""P7: what attention, feed-forward and recurrent layers do on the first batch, in one forward of its own.

It runs for models that have such layers, or whose inputs are sequences; images through convolutions cost nothing.
Dropout is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zero_cost.captured import Named, Probe
from zero_cost.errors import NoValue
from zero_cost.layers import TransformerLayers, transformer_layers
from zero_cost.passes.recurrent import RecurrentStates, undropped
from zero_cost.watch import DROPOUT_CALLS, LINEAR_CALLS, RELU_CALLS, Watch, argument

FIELDS = (
    "layers",
    "attention",
    "output_gradients",
    "absolute_gradients",
    "hidden",
    "hidden_gradients",
    "sign_agreement",
)
SOFTMAX_CALLS = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax})
# Increasing functions through 0 (or nearly), and the sigmoid: the sign of the input is the code.
ACTIVATION_CALLS = RELU_CALLS | {
    F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish,
    F.tanh, torch.tanh, torch.tanh_, torch.Tensor.tanh, torch.Tensor.tanh_,
    F.sigmoid, torch.sigmoid, torch.sigmoid_, torch.Tensor.sigmoid, torch.Tensor.sigmoid_,
}  # fmt: skip


class Attention:
    """Of a model with attention layers, over the first batch.

    projections: per projection to queries, keys or values, the mean over samples and
    channels of its maximum over tokens. maxima: per attention, the mean over samples, heads and queries of the
    greatest probability. spectra: per feed-forward pair the eigenvalues of the covariance of its hidden outputs.
    """

    def __init__(self) -> None:
        self.projections: list[float] = []
        self.maxima: list[float] = []
        self.spectra: list[torch.Tensor] = []


def sequences_pass(probe: Probe) -> None:
    """Everything of FIELDS that is wanted; NoValue where the model has no such layers."""
    if not probe.wants(*FIELDS):
        return
    network, captured = probe.network, probe.captured
    layers = transformer_layers(network.model)
    inputs = probe.batches[0][0]
    captured.layers = layers
    if not layers.modules:
        for name in ("layers", "attention", "output_gradients", "absolute_gradients"):
            probe.failed.setdefault(name, "the model has no attention layers")
    recurrent = any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in network.model.modules())
    if not recurrent and inputs.is_floating_point() and inputs.dim() != 3:  # else a layer may turn out to be recurrent
        for name in ("hidden", "hidden_gradients"):
            probe.failed.setdefault(name, "the model has no recurrent layers")
        if not layers.modules:
            reason = "the model has neither attention nor recurrent layers: nwot reads the codes of its ReLUs"
            probe.failed.setdefault("sign_agreement", reason)
    shared = ("attention", "output_gradients", "hidden", "hidden_gradients", "sign_agreement")
    with undropped(network.model):
        if probe.wants("absolute_gradients"):
            with probe.step("absolute weights", "absolute_gradients"):
                captured.absolute_gradients = _absolute_gradients(probe)
        if probe.wants(*shared):
            _forward(probe, layers, shared)


def _forward(probe: Probe, layers: TransformerLayers, shared: tuple[str, ...]) -> None:
    network, captured = probe.network, probe.captured
    inputs = probe.batches[0][0]
    watched = _Sequences(probe, layers)
    with probe.step("sequences", *shared):
        states = RecurrentStates(network.model, wanted=probe.wants("hidden", "hidden_gradients"))
        with (
            torch.set_grad_enabled(probe.wants("output_gradients", "hidden_gradients")),
            _inside(network.model, layers.modules, watched),
            states,
            Watch(watched),
        ):
            outputs = network.forward(inputs.detach().clone())
        captured.attention, captured.hidden = watched.attention, [[h.detach() for h in layer] for layer in states.found]
        if probe.wants("sign_agreement"):
            if watched.agreement is None:
                probe.failed["sign_agreement"] = "the model calls no activation function that can be seen"
            else:
                captured.sign_agreement = watched.agreement
        if not states.found:
            for name in ("hidden", "hidden_gradients"):
                probe.failed.setdefault(name, "the model has no recurrent layers")
    if probe.wants("output_gradients"):
        with probe.step("sequences backward", "output_gradients"), torch.enable_grad():
            retain = probe.wants("hidden_gradients")
            captured.output_gradients = _gradients(outputs, torch.ones_like(outputs), network.weights, [], retain)[0]
    if probe.wants("hidden_gradients"):
        with probe.step("recurrent backward", "hidden_gradients"), torch.enable_grad():
            flat = [h for layer in states.found for h in layer]
            weights, gradients = _gradients(outputs, outputs.detach(), network.weights, flat)
            captured.hidden_gradients = weights, list(zip([h.detach() for h in flat], gradients, strict=True))


def _gradients(
    outputs: torch.Tensor, cotangent: torch.Tensor, weights: Named, tensors: list[torch.Tensor], retain: bool = False
) -> tuple[Named, list[torch.Tensor]]:
    """Vector-Jacobian products for the weights by name and for tensors; zeros where nothing depends on them."""
    places = [*weights.values(), *tensors]
    if not places or not outputs.requires_grad:
        raise NoValue("the output does not depend on the weights")
    found = [
        torch.zeros_like(place) if g is None else g
        for place, g in zip(
            places,
            torch.autograd.grad(outputs, places, cotangent, retain_graph=retain, allow_unused=True),
            strict=True,
        )
    ]
    return dict(zip(weights, found, strict=False)), found[len(weights) :]


def _absolute_gradients(probe: Probe) -> Named:
    """dR/dW at absolute weights, R = sum of the outputs for one sample of ones (token 1), normalisation kept."""
    network, like = probe.network, probe.batches[0][0][:1]
    parameters = {name: p.detach().double().abs() for name, p in network.parameters.items()}
    weights = {name: parameters[name].requires_grad_() for name in network.weights}
    ones = torch.ones_like(like, dtype=torch.float64 if like.is_floating_point() else like.dtype)
    with torch.enable_grad(), Watch(_without_dropout):
        outputs = network.forward(ones, parameters, torch.float64)
    return _gradients(outputs, torch.ones_like(outputs), weights, [])[0]


def _without_dropout(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in DROPOUT_CALLS:
        return argument("input", 0, args, kwargs)
    if func is F.multi_head_attention_forward or func is F.scaled_dot_product_attention:
        return func(**{**_arguments(func, args, kwargs), "dropout_p": 0.0})
    return func(*args, **kwargs)


# F.scaled_dot_product_attention is built in and has no signature to inspect.
_DOT_PRODUCT = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if func is F.multi_head_attention_forward:
        return dict(_MULTI_HEAD.bind(*args, **kwargs).arguments)
    return {**dict(zip(_DOT_PRODUCT, args, strict=False)), **kwargs}


class _Sequences:
    """Handler of a Watch: reduces what passes by to what the proxies need."""

    def __init__(self, probe: Probe, layers: TransformerLayers):
        self.attention, self.projections = Attention(), layers.projections
        self.wanted, self.codes = probe.wants("attention"), probe.wants("sign_agreement")
        self.samples = len(probe.batches[0][0])
        self.names = {id(w): name for name, w in probe.network.parameters.items()}
        self.hidden = {first for first, _ in layers.feed_forward}
        self.agreement: torch.Tensor | None = None
        self.depth = 0  # of attention layers that are being run

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.codes and func in ACTIVATION_CALLS:
            self._see(argument("input", 0, args, kwargs).detach())
        if func is F.multi_head_attention_forward and self.wanted:
            return self._multi_head(_arguments(func, args, kwargs))
        if func is F.scaled_dot_product_attention and self.wanted:
            self._dot_product(_arguments(func, args, kwargs))
        result = _without_dropout(func, args, kwargs)
        if not self.wanted:
            return result
        if func in LINEAR_CALLS:
            name = self.names.get(id(argument("weight", 1, args, kwargs)), "")
            if name in self.projections:
                self._project(result.detach(), self.projections[name])
            elif name in self.hidden:
                self.attention.spectra.append(covariance_spectrum(result.detach()))
        elif func in SOFTMAX_CALLS and self.depth and result.dim() >= 3:
            self._softmax(result.detach(), argument("dim", 1, args, kwargs))
        return result

    def _see(self, x: torch.Tensor) -> None:
        if x.dim() > 1 and x.shape[0] != self.samples and x.shape[1] == self.samples:
            x = x.transpose(0, 1)  # time first
        if x.dim() < 2 or x.shape[0] != self.samples:
            return
        signs = (x.reshape(self.samples, -1) > 0).float() * 2 - 1
        same = (signs @ signs.T).double()  # agreements minus disagreements; exact below 2^24
        same = (same + signs.shape[1]) / 2
        self.agreement = same if self.agreement is None else self.agreement + same

    def _project(self, x: torch.Tensor, parts: int, tokens: int = 1) -> None:
        """[B, ..., D], the tokens in between."""
        if x.dim() >= 3:
            x = x.flatten(1, -2) if tokens == 1 else x
            self.attention.projections.append(parts * x.amax(tokens).double().mean().item())

    def _probabilities(self, x: torch.Tensor) -> None:
        self.attention.maxima.append(x.amax(-1).double().mean().item())

    def _softmax(self, x: torch.Tensor, dim: int) -> None:
        if dim in (-1, x.dim() - 1):
            self._probabilities(x)

    def _dot_product(self, given: dict[str, Any]) -> None:
        """The probabilities are what attention makes of one-hot values."""
        with torch.no_grad():
            key = given["key"]
            ones = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device)
            value = ones.expand(*key.shape[:-2], -1, -1)
            rest = {name: v for name, v in given.items() if name != "value"} | {"dropout_p": 0.0}
            self._probabilities(F.scaled_dot_product_attention(value=value, **rest))

    def _multi_head(self, given: dict[str, Any]) -> Any:
        asked = given.get("need_weights", True), given.get("average_attn_weights", True)
        given |= {"need_weights": True, "average_attn_weights": False, "dropout_p": 0.0}
        output, probabilities = F.multi_head_attention_forward(**given)
        assert probabilities is not None  # weights were asked for
        with torch.no_grad():
            self._probabilities(probabilities)
            stacked, bias = given["in_proj_weight"], given["in_proj_bias"]
            kinds = ("query", "key", "value")
            own = [given.get(f"{kind[0]}_proj_weight") for kind in kinds]
            matrices = own if stacked is None else stacked.chunk(3)
            for kind, matrix, b in zip(kinds, matrices, [None] * 3 if bias is None else bias.chunk(3), strict=True):
                if given[kind].dim() == 3:
                    self._project(F.linear(given[kind], matrix, b), 1, tokens=0)  # time first
        return output, (probabilities.mean(1) if asked[1] else probabilities) if asked[0] else None


def covariance_spectrum(x: torch.Tensor) -> torch.Tensor:
    """Eigenvalues, ascending, of the covariance of the last dimension over all others."""
    rows = x.reshape(-1, x.shape[-1]).double()
    rows = rows - rows.mean(0)
    gram = rows.T @ rows if len(rows) >= rows.shape[1] else rows @ rows.T  # the others are 0
    return torch.linalg.eigvalsh(gram / len(rows)).clamp(min=0)


class _inside:
    """Counts how deep inside the named modules the forward pass is."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], watched: _Sequences):
        self.modules, self.watched = [model.get_submodule(name) for name in names], watched
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        def move(by: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self.watched.depth += by

            return hook

        for module in self.modules:
            self.handles += [module.register_forward_pre_hook(move(1)), module.register_forward_hook(move(-1))]

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
