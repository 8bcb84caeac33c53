"""A model as a function of its parameters, so that nothing of the model changes whatever the passes do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from zero_cost.errors import NoValue, UserError

CONVOLUTIONS = nn.modules.conv._ConvNd
# Apart from the caller's seeds: noise drawn as data must not be drawn again. Generators read the low 32 bits.
OWN_DRAWS = 0x9E3779B1
Output = Callable[[Any], torch.Tensor]


def first_tensor(output: Any) -> torch.Tensor:
    """The logits of a model's output: the tensor itself, `logits` where there is such a key or attribute, else the
    first tensor of a tuple, list or mapping."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        output = [output["logits"]] if "logits" in output else list(output.values())
    elif hasattr(output, "logits"):
        output = [output.logits]
    for item in output if isinstance(output, tuple | list) else ():
        if isinstance(item, torch.Tensor):
            return item
    raise NoValue(f"the model returns no tensor but {type(output).__name__}")


def weight_names(model: nn.Module) -> list[str]:
    """The W_l of the formulas: weights of convolutions, linear layers, attention projections and recurrent layers,
    each once, in the order of `named_parameters`. No biases, embeddings or normalisations."""
    kinds = (CONVOLUTIONS, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    owners = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return [
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] in owners and "weight" in name.rpartition(".")[2] and parameter.dim() >= 2
    ]


class Network:
    """The forward pass of `model` with any parameters, in training mode, from one seed.

    Parameters are detached aliases and buffers are copies, so weights, gradients and statistics of the model stay as
    they are. device: where to compute (default: where the model is). output: model output -> logits.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None, seed: int, output: Output = first_tensor):
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
            raise UserError(type(model).__name__, "a model whose lazy layers have been initialised by a forward pass")
        tensors = [*model.parameters(), *model.buffers()]
        self.model, self.seed, self.output = model, seed, output
        self.device = torch.device(device or (tensors[0].device if tensors else "cpu"))
        # An alias on the same device; frozen parameters take part like the others.
        self.parameters = {n: p.detach().to(self.device).requires_grad_() for n, p in model.named_parameters()}
        self.weights = {name: self.parameters[name] for name in weight_names(model)}

    def forward(
        self, inputs: torch.Tensor, parameters: dict[str, torch.Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The logits. parameters: by name (default: the model's own); dtype: of floating buffers (default: as is).

        Every call starts from the same random state: dropout masks agree between passes.
        """
        buffers = {name: b.detach().to(self.device, copy=True) for name, b in self.model.named_buffers()}
        if dtype is not None:
            buffers = {name: b.to(dtype) if b.is_floating_point() else b for name, b in buffers.items()}
        state = {**(parameters or self.parameters), **buffers}
        with random_state(self.device, self.seed):
            return self.output(functional_call(self.model, state, (inputs,)))

    def generator(self) -> torch.Generator:
        """Our own draws, on the CPU so that values do not depend on the device."""
        return torch.Generator().manual_seed(OWN_DRAWS + self.seed)


@contextlib.contextmanager
def random_state(device: torch.device, seed: int) -> Iterator[None]:
    """The global generators of the CPU and of `device` start from `seed` inside and are as before afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Inside, a GPU repeats its results and computes in float32, not TF32; the switches are as before afterwards."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    switches: list[tuple[Any, str, bool]] = [
        (convolutions, "deterministic", True),
        (convolutions, "benchmark", False),
        (convolutions, "allow_tf32", False),
        (products, "allow_tf32", False),
    ]
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode inside (BatchNorm uses the statistics of the batch); every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
