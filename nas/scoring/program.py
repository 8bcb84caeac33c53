"""One program for many architectures: equal calls on equal values are computed once, several values in one call.

The network of all choices runs once on placeholders that know, for every architecture, which value they stand for. What
results is a list of distinct values; those that are wanted are then computed in its order. Architectures share the
stem, the first cell as far as they agree, whatever only `none` tells apart, and ReLUs of one node; what does not reach
anything wanted is not computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from search_spaces.choice import Choice, find_choices
from zero_cost.watch import (
    BATCH_NORM_CALLS,
    CONVOLUTION_CALLS,
    DROPOUT_CALLS,
    LINEAR_CALLS,
    NORM_CALLS,
    POOLING_CALLS,
    RELU_CALLS,
    argument,
    changes_in_place,
    is_relu,
)

ADDITIONS = frozenset({torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__})
# Calls that treat every sample by itself, so that samples of several architectures may stand in one batch.
BY_SAMPLE = CONVOLUTION_CALLS | LINEAR_CALLS | RELU_CALLS | POOLING_CALLS | {F.gelu, F.silu, F.hardswish, F.max_pool2d}
INPUT = 0  # the first value
See = Callable[[list[int], torch.Tensor], None]
Ids = np.ndarray  # [architectures], the value that each of them has at a place; -1 where it does not come by


class NotTogether(Exception):
    """The network does what a program of many architectures cannot hold; the text says what."""


class Traced(torch.Tensor):
    """A placeholder: a tensor without memory, and the value of each architecture."""

    program: Program
    ids: Ids
    meta_shape: tuple[int, ...]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        leaves, _ = tree_flatten((args, kwargs or {}))
        program = next(leaf.program for leaf in leaves if isinstance(leaf, Traced))
        return program.call(func, args, kwargs or {})


class Call:
    """A function and all its arguments but the values, for which `leaves` has VALUE. shape: of the result."""

    def __init__(self, func: Callable[..., Any], leaves: list[Any], spec: TreeSpec, shape: torch.Size, together: bool):
        self.func, self.shape, self.together = func, shape, together
        self.leaves, self.spec = leaves, spec
        args, self.kwargs = tree_unflatten(leaves, spec)
        self.args = list(args)
        # Flat calls, nearly all there are, are put together without walking through their arguments.
        flat = (*self.args, *self.kwargs.values())
        self.flat = len(flat) == len(leaves) and not any(value is VALUE for value in self.kwargs.values())
        self.places = [k for k, value in enumerate(self.args) if value is VALUE]
        self.weighted = any(isinstance(leaf, nn.Parameter) for leaf in leaves)

    def given(
        self, values: Sequence[torch.Tensor], state: Mapping[int, torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments, with `state` in place of the network's own tensors."""
        if not self.flat:
            left = iter(values)
            leaves = [next(left) if leaf is VALUE else state.get(id(leaf), leaf) for leaf in self.leaves]
            return tree_unflatten(leaves, self.spec)
        if not state:
            args, kwargs = list(self.args), self.kwargs
        else:
            args = [state.get(id(x), x) for x in self.args]
            kwargs = {name: state.get(id(x), x) for name, x in self.kwargs.items()}
        for k, value in zip(self.places, values, strict=True):
            args[k] = value
        return tuple(args), kwargs

    def __call__(self, values: Sequence[torch.Tensor], state: Mapping[int, torch.Tensor]) -> torch.Tensor:
        args, kwargs = self.given(values, state)
        return self.func(*args, **kwargs)


VALUE = object()  # an argument that is a value


class Program:
    """The forward passes of many architectures through `network`, a module with Choices, in training mode.

    selections: one {label: candidate} per architecture. like: the inputs, or a tensor of their shape. without_norms:
    normalisation and dropout are the identity. separate_relus: ReLU calls of one value are values of their own, so that
    `behind` tells which of them lead somewhere. Errors: NotTogether.

    relus, norms: per ReLU and BatchNorm call the values that it reads and those that it makes. leaves: those that a
    leaf module returns. pools: those that a global average pooling reads. stages: what enters the first module of
    `stages`, then what each returns. output: the logits.
    """

    def __init__(
        self,
        network: nn.Module,
        selections: Sequence[Mapping[str, int]],
        like: torch.Tensor,
        *,
        without_norms: bool = False,
        separate_relus: bool = False,
        stages: Sequence[str] = (),
    ):
        self.count, self.without_norms, self.separate_relus = len(selections), without_norms, separate_relus
        self.picks = {label: np.array([s[label] for s in selections]) for label in find_choices(network)}
        self.calls: list[Call] = []
        self.node_call: list[int] = [-1]
        self.node_args: list[tuple[int, ...]] = [()]
        self.node_event: list[int] = [0]
        self.zeros: set[int] = set()
        self.constant: set[int] = {INPUT}  # what no weight leads to
        self.largest = like[0].numel()  # elements of one sample of the largest value
        self.relus: list[tuple[Ids, Ids]] = []
        self.leaves: list[Ids] = []
        self.norms: list[tuple[Ids, Ids]] = []
        self.pools: list[Ids] = []
        self.stages: list[Ids] = []
        self._calls: dict[Any, int] = {}
        self._nodes: dict[Any, int] = {}
        self._results: dict[Any, Any] = {}
        self._events = 0
        start = self._placeholder(torch.empty_like(like, device="meta"), np.zeros(self.count, np.int64))
        network.train()
        handles = self._hooks(network, stages)
        try:
            with torch.no_grad():
                result = network(start)
        finally:
            for handle in handles:
                handle.remove()
            for part in network.modules():
                part.__dict__.pop("forward", None)
        if not isinstance(result, Traced):
            raise NotTogether(f"the network returns {type(result).__name__}")
        self.output = result.ids

    def _hooks(self, network: nn.Module, stages: Sequence[str]) -> list[Any]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Traced) and len(output.meta_shape) >= 3:
                self.leaves.append(output.ids)

        handles = [m.register_forward_hook(leave) for m in network.modules() if next(m.children(), None) is None]
        for k, name in enumerate(stages):
            module = network.get_submodule(name)
            if k == 0:
                handles.append(module.register_forward_pre_hook(lambda m, args: self.stages.append(args[-1].ids)))
            handles.append(module.register_forward_hook(lambda m, args, output: self.stages.append(output.ids)))
        for part in network.modules():
            if isinstance(part, Choice):
                part.forward = lambda *inputs, choice=part: self._choose(choice, inputs)  # type: ignore[method-assign]
        return handles

    def _choose(self, choice: Choice, inputs: tuple[Any, ...]) -> Traced:
        """Every candidate for the architectures that select it."""
        ids, shape, made = np.full(self.count, -1), None, None
        for k, candidate in enumerate(choice.candidates):
            chosen = (self.picks[choice.label] == k) & (inputs[0].ids >= 0)
            if not chosen.any():
                continue
            made = candidate(*(self._placeholder(x, np.where(chosen, x.ids, -1)) for x in inputs))
            if not isinstance(made, Traced) or shape not in (None, made.meta_shape):
                raise NotTogether(f"candidates of {choice.label} differ in what they return")
            shape = made.meta_shape
            ids[chosen] = made.ids[chosen]
        if made is None:
            raise NotTogether(f"nothing is selected at {choice.label}")
        return self._placeholder(made, ids)

    def _placeholder(self, like: torch.Tensor, ids: Ids) -> Traced:
        with torch._C.DisableTorchFunctionSubclass():
            found = like.detach().as_subclass(Traced)
            shape = tuple(like.shape)
        found.program, found.ids, found.meta_shape = self, ids, shape
        return found

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` returns for placeholders: a placeholder, or what follows from the shapes alone."""
        if self.without_norms and (func in NORM_CALLS or func in DROPOUT_CALLS):
            return argument("input", 0, args, kwargs)
        if changes_in_place(func, args, kwargs):
            raise NotTogether(f"{func.__name__} overwrites its input")
        leaves, spec = tree_flatten((args, kwargs))
        result = self._shape_of(func, leaves, spec)
        if not isinstance(result, torch.Tensor):
            if any(isinstance(x, torch.Tensor) for x in tree_flatten(result)[0]):
                raise NotTogether(f"{func.__name__} returns several tensors")
            return result
        if func in DROPOUT_CALLS:
            raise NotTogether("dropout draws at random")
        traced = [x for x in leaves if isinstance(x, Traced)]
        call = self._call(func, leaves, spec, result.shape)
        ids = self._values(call, [x.ids for x in traced])
        if is_relu(func, args, kwargs):
            self.relus.append((traced[0].ids, ids))
        elif func in BATCH_NORM_CALLS:
            self.norms.append((traced[0].ids, ids))
        elif func in POOLING_CALLS and result.dim() > 2 and result.numel() == result.shape[0] * result.shape[1]:
            self.pools.append(traced[0].ids)
        return self._placeholder(result, ids)

    def _shape_of(self, func: Callable[..., Any], leaves: list[Any], spec: TreeSpec) -> Any:
        """What the call returns on the meta device; asked once for arguments of the same shapes."""
        with torch._C.DisableTorchFunctionSubclass():
            marks = [(tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves]
            key = func, spec, tuple(marks)
            if key not in self._results:
                metas = [torch.empty_like(x, device="meta") if isinstance(x, torch.Tensor) else x for x in leaves]
                given, named = tree_unflatten(metas, spec)
                self._results[key] = func(*given, **named)
            return self._results[key]

    def _call(self, func: Callable[..., Any], leaves: list[Any], spec: TreeSpec, shape: torch.Size) -> int:
        if func in ADDITIONS and len(leaves) == 2:
            func = torch.add
        marks = []
        for leaf in leaves:
            marks.append(
                "." if isinstance(leaf, Traced) else id(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)
            )
        if self.separate_relus and func in RELU_CALLS:
            marks.append(len(self.relus))
        key = func, spec, tuple(marks), tuple(shape)
        if key not in self._calls:
            plain = [VALUE if isinstance(x, Traced) else x for x in leaves]
            together = func in BY_SAMPLE or func in BATCH_NORM_CALLS or (func is torch.add and marks == [".", "."])
            self._calls[key] = len(self.calls)
            self.calls.append(Call(func, plain, spec, shape, together))
            self.largest = max(self.largest, shape.numel() // max(shape[0], 1) if shape else 0)
        return self._calls[key]

    def _values(self, call: int, ids: list[Ids]) -> Ids:
        """The value of every architecture, new ones as they are needed."""
        stacked = np.stack(ids)
        here = (stacked >= 0).all(0)
        found = np.full(self.count, -1)
        if here.any():
            code = np.zeros(int(here.sum()), np.int64)
            for row in stacked:
                code = code * len(self.node_call) + row[here]
            _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
            self._events += 1
            rows = stacked[:, here][:, first].T.tolist()
            found[here] = np.array([self._node(call, tuple(row)) for row in rows])[inverse]
        return found

    def _node(self, call: int, args: tuple[int, ...]) -> int:
        func = self.calls[call].func
        if func is torch.add and len(args) == 2 and self.calls[call].together:
            if args[0] in self.zeros:
                return args[1]
            if args[1] in self.zeros:
                return args[0]
            args = args if args[0] <= args[1] else args[::-1]
        elif func is torch.zeros_like:
            args = ()
        key = call, args
        if key not in self._nodes:
            node = self._nodes[key] = len(self.node_call)
            self.node_call.append(call)
            self.node_args.append(args)
            self.node_event.append(self._events)
            if func is torch.zeros_like:
                self.zeros.add(node)
            if not self.calls[call].weighted and self.constant.issuperset(args):
                self.constant.add(node)
        return self._nodes[key]

    def behind(self, wanted: set[int]) -> set[int]:
        """`wanted` and all values that they are made of."""
        found: set[int] = set()
        waiting = list(wanted)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += self.node_args[node]
        return found

    def run(
        self,
        inputs: torch.Tensor,
        wanted: set[int],
        see: See,
        *,
        state: Mapping[int, torch.Tensor] | None = None,
        variances: dict[int, torch.Tensor] | None = None,
        elements: int = 1 << 19,
    ) -> None:
        """Compute the wanted values and show them: `see(values, [len(values), samples, ...])`.

        state: {id of a tensor of the network: what stands for it}. variances: is filled with the unbiased variances of
        the channels of every value that a BatchNorm reads on the way. elements: of the values of one call, at most (but
        for a single one).
        """
        nodes = sorted(self.behind(wanted))
        uses = Counter(arg for node in nodes for arg in self.node_args[node])
        values: dict[int, torch.Tensor] = {INPUT: inputs}
        if INPUT in wanted:
            see([INPUT], inputs[None])
        with torch.no_grad():
            for _, same in groupby((n for n in nodes if n != INPUT), lambda n: (self.node_event[n], self.node_call[n])):
                group = list(same)
                call = self.calls[self.node_call[group[0]]]
                size = max(1, elements // max(call.shape.numel(), 1)) if call.together else 1
                for begin in range(0, len(group), size):
                    part = group[begin : begin + size]
                    made = self._compute(call, part, inputs, values, state or {}, variances)
                    values |= dict(zip(part, made, strict=True))
                    shown = [k for k, node in enumerate(part) if node in wanted]
                    if shown:
                        see([part[k] for k in shown], made if len(shown) == len(part) else made[shown])
                    for node in part:
                        for arg in self.node_args[node]:
                            uses[arg] -= 1
                            if not uses[arg]:
                                del values[arg]
                        if not uses[node]:
                            del values[node]

    def _compute(
        self,
        call: Call,
        nodes: list[int],
        inputs: torch.Tensor,
        values: Mapping[int, torch.Tensor],
        state: Mapping[int, torch.Tensor],
        variances: dict[int, torch.Tensor] | None,
    ) -> torch.Tensor:
        """[len(nodes), samples, ...]"""
        if call.func is torch.zeros_like:
            zeros = inputs.new_zeros(call.shape)
            nhwc = zeros.dim() == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
            return (zeros.contiguous(memory_format=torch.channels_last) if nhwc else zeros)[None]
        if call.func in BATCH_NORM_CALLS:
            (read,) = zip(*(self.node_args[n] for n in nodes), strict=True)
            made, spreads = _batch_norms(call, [values[n] for n in read], state, variances is not None)
            if variances is not None:
                variances.update(zip(read, spreads, strict=True))
            return made
        columns = [[values[n] for n in column] for column in zip(*(self.node_args[n] for n in nodes), strict=True)]
        given = [column[0] if len(nodes) == 1 else torch.cat(column) for column in columns]
        result = call(given, state)
        return result.view(len(nodes), -1, *result.shape[1:]) if len(nodes) > 1 else result[None]


def _batch_norms(
    call: Call, values: Sequence[torch.Tensor], state: Mapping[int, torch.Tensor], spread: bool
) -> tuple[torch.Tensor, Iterable[torch.Tensor]]:
    """BatchNorm of [samples, channels, ...] of each architecture by itself: ([architectures, samples, channels, ...],
    unbiased variances [architectures, channels] if `spread`)."""
    args, kwargs = call.given(values[:1], state)
    weight, bias = argument("weight", 3, args, kwargs), argument("bias", 4, args, kwargs)
    eps = argument("eps", 7, args, kwargs, 1e-5)
    if len(values) == 1 or values[0].device.type == "cpu":  # whose own kernel is several times as fast
        found, spreads = [], []
        for x in values:
            mean, variance = (x.new_zeros(x.shape[1]) if spread else None for _ in range(2))
            found.append(F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps))
            spreads.append(variance)
        return found[0][None] if len(values) == 1 else torch.stack(found), spreads  # type: ignore[return-value]
    return _batch_norms_together(torch.stack(list(values)), weight, bias, eps)


def _batch_norms_together(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for x [architectures, samples, channels, ...] in a few calls."""
    shape = [1, 1, -1, *[1] * (x.dim() - 3)]
    others = [d for d in range(1, x.dim()) if d != 2]
    variance, mean = torch.var_mean(x, others, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    scale = scale if weight is None else scale * weight.view(shape)
    shift = -mean * scale
    count = x[0].numel() // x.shape[2]
    return torch.addcmul(shift if bias is None else shift + bias.view(shape), x, scale), (
        variance * count / max(count - 1, 1)
    ).view(len(x), -1)
