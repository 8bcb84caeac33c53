"""The hidden states of every recurrent layer of a model, step by step and inside the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zero_cost.errors import NoValue

CELLS: dict[str, Any] = {
    "RNN_TANH": torch.rnn_tanh_cell,
    "RNN_RELU": torch.rnn_relu_cell,
    "LSTM": torch.lstm_cell,
    "GRU": torch.gru_cell,
}


@contextlib.contextmanager
def undropped(model: nn.Module) -> Iterator[None]:
    """Inside, stacked recurrent layers drop nothing between them, which no call shows that could be left out."""
    kept = [(module, module.dropout) for module in model.modules() if isinstance(module, nn.RNNBase)]
    try:
        for module, _ in kept:
            module.dropout = 0.0
        yield
    finally:
        for module, dropout in kept:
            module.dropout = dropout


class RecurrentStates:
    """Inside `with`, collects hidden states; `found` then has one list of tensors [..., H] per recurrent layer.

    Recurrent are nn.RNN, nn.LSTM and nn.GRU (run cell by cell, every layer and direction by itself, without dropout);
    modules that get what they returned as an input again (cells: the first tensor they return is the state); and
    modules that return states of all steps and the last state, `(outputs [., ., H], state [..., H])`. Of nested ones
    the innermost counts.
    """

    def __init__(self, model: nn.Module, wanted: bool = True):
        self.model, self.wanted = model, wanted
        self.found: list[list[torch.Tensor]] = []
        self._layers: dict[str, list[list[torch.Tensor]]] = {}  # by module, in order of the first call
        self._states: dict[str, list[torch.Tensor]] = {}
        self._last: dict[str, list[torch.Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        if not self.wanted:
            return
        attention = [name for name, m in self.model.named_modules() if isinstance(m, nn.MultiheadAttention)]
        for name, module in self.model.named_modules():
            if isinstance(module, nn.RNNBase):
                hook = self._unroll(name)
            elif any(inner == name or inner.startswith(f"{name}." * bool(name)) for inner in attention):
                continue  # returns outputs and weights
            else:
                hook = self._follow(name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        names = list(self._layers)
        innermost = [n for n in names if not any(m != n and m.startswith(f"{n}." * bool(n)) for m in names)]
        self.found = [layer for name in innermost for layer in self._layers[name] if layer]
        self._last.clear()

    def _unroll(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            inputs, start = [*args, *kwargs.values(), None][:2]
            if isinstance(inputs, nn.utils.rnn.PackedSequence) or inputs.dim() != 3 or module.proj_size:
                raise NoValue("packed, unbatched or projected recurrent layers are not followed step by step")
            layers: list[list[torch.Tensor]] = []
            again = unrolled(module, inputs, start, layers)
            if name in self._layers:  # called before: more steps of the same layers
                for states, more in zip(self._layers[name], layers, strict=True):
                    states += more
            else:
                self._layers[name] = layers
            return again

        return hook

    def _follow(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            returned = list(_tensors(output))
            if not returned:
                return
            states = self._states.setdefault(name, [])
            if returned[0].dim() == 2:
                fed = {id(tensor) for tensor in _tensors((args, kwargs))}
                again = any(id(tensor) in fed for tensor in self._last.get(name, ()))
                states.append(returned[0])
                self._last[name] = returned
                if again or isinstance(module, nn.RNNCellBase):
                    self._layers[name] = [states]
            elif isinstance(output, tuple) and _outputs_and_state(returned):
                states.append(returned[0])
                self._layers[name] = [states]

        return hook


def unrolled(module: Any, inputs: torch.Tensor, start: Any, layers: list[list[torch.Tensor]]) -> tuple[Any, Any]:
    """What a recurrent module returns for [B, T, D] or [T, B, D] inputs, one step after the other; `layers` gets the
    states [B, H] of each layer and direction."""
    steps = inputs.transpose(0, 1) if module.batch_first else inputs
    directions = 2 if module.bidirectional else 1
    cell, is_lstm = CELLS[module.mode], module.mode == "LSTM"
    shape = module.num_layers * directions, steps.shape[1], module.hidden_size
    if start is None:
        zeros = steps.new_zeros(shape)
        start = (zeros, zeros) if is_lstm else zeros
    first, memories = start if is_lstm else (start, start)
    ends, end_memories = [], []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            h, c, states = first[k], memories[k], []
            for x in steps.flip(0) if direction else steps:
                if is_lstm:
                    h, c = cell(x, (h, c), *module.all_weights[k])
                else:
                    h = cell(x, h, *module.all_weights[k])
                states.append(h)
            layers.append(states)
            ends.append(h)
            end_memories.append(c)
            outputs.append(torch.stack(states[::-1] if direction else states))
        steps = torch.cat(outputs, -1)
    last = (torch.stack(ends), torch.stack(end_memories)) if is_lstm else torch.stack(ends)
    return (steps.transpose(0, 1) if module.batch_first else steps), last


def _outputs_and_state(returned: list[torch.Tensor]) -> bool:
    outputs, *state = returned
    return bool(state) and outputs.dim() == 3 and all(s.shape[-1] == outputs.shape[-1] and s.dim() <= 3 for s in state)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
