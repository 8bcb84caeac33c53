"""Normalisations fused in a traced graph, where activations may be functions or shared, and residual sums between."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from kernels.norm_act import FUSED, activation_of, refusal
from search_spaces.common.errors import UserError
from search_spaces.layers.sites import Site, sites_by_trace

_MODULES: dict[str, Callable[..., nn.Module]] = {  # by the name of the function, called with its further arguments
    **dict.fromkeys(("relu", "relu_"), nn.ReLU),
    **dict.fromkeys(("sigmoid", "sigmoid_"), nn.Sigmoid),
    **dict.fromkeys(("tanh", "tanh_"), nn.Tanh),
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
}
_ADDITIONS = {operator.add, torch.add}  # torch.fx records `a += b` as the former


@dataclass(frozen=True)
class Rewrite:
    """A normalisation, what is added to its output (None for nothing), and the activation behind: calls in a graph."""

    norm: fx.Node
    addition: fx.Node | None
    residual: fx.Node | None
    act: fx.Node
    module: nn.Module


def rewritten(model: nn.Module, backend: str) -> tuple[fx.GraphModule, dict[str, tuple[bool, str]]]:
    """The model as a GraphModule with fused normalisations, and of each whether it is one and why.

    The model itself stays as it is, shares all tensors, and is kept for `unfuse`. Errors: UserError if torch.fx
    cannot trace it, or finds different code in training and evaluation.
    """
    sites, graph = _traced(model)
    report: dict[str, tuple[bool, str]] = {}
    fused: dict[str, nn.Module] = {}
    for site in sites:
        norm = model.get_submodule(site.norm)
        found = rewrite_of(model, site)
        if isinstance(found, str):
            report[site.norm] = (False, found)
            continue
        _apply(graph, found)
        fused[site.norm] = FUSED[type(norm)].of(norm, found.module, backend, rewritten=True)
        what = type(found.module).__name__ + (" and a residual" if found.residual is not None else "")
        report[site.norm] = (True, f"{type(norm).__name__} with {what}")
    graph.lint()
    result = fx.GraphModule(model, graph, type(model).__name__)
    _fill(result, model)
    for name, module in fused.items():
        replace_everywhere(result, name, module)
    copy_modes(model, result)
    result.__dict__["_before_rewriting"] = (model,)
    return result, report


def _traced(model: nn.Module) -> tuple[list[Site], fx.Graph]:
    modes = {module: module.training for module in model.modules()}
    codes = []
    try:
        for training in (False, True):
            model.train(training)
            sites, graph = sites_by_trace(model)
            codes.append(str(graph))
    except Exception as error:  # whatever a model's own code raises when it meets symbolic values
        raise UserError(
            type(model).__name__, f"a model that torch.fx can trace, for `rewrite` ({str(error)[:120]})"
        ) from None
    finally:
        for module, mode in modes.items():
            module.training = mode
    if codes[0] != codes[1]:
        raise UserError(type(model).__name__, "for `rewrite` a model whose code is the same in training and evaluation")
    return sites, graph


def rewrite_of(model: nn.Module, site: Site) -> Rewrite | str:
    """What is fused with a normalisation by rewriting, or why it cannot be."""
    if site.obstacle or site.norm_node is None:
        return site.obstacle or "never called"
    if len(site.norm_node.args) != 1 or site.norm_node.kwargs:
        return "it is called with named arguments"
    node, addition, residual = site.norm_node, None, None
    behind = _only_user(node)
    if behind is not None and _adds(behind):
        others = [a for a in behind.args if a is not node]
        if len(others) == 1 and isinstance(others[0], fx.Node):
            node, addition, residual = behind, behind, others[0]
            behind = _only_user(node)
    if behind is None:
        return "its output is used in several places" if len(node.users) > 1 else "no activation follows"
    module = _as_module(model, behind)
    if module is None or (activation_of(module) is None and not site.act):
        return "no activation follows"
    norm = model.get_submodule(site.norm)
    if reason := refusal(norm, module):
        return reason
    if residual is not None and isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        return f"kernels add residuals before {type(norm).__name__}, not behind it"
    return Rewrite(site.norm_node, addition, residual, behind, module)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _adds(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _ADDITIONS and len(node.args) == 2 and not node.kwargs


def _as_module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The activation that a node calls, as a module; None if it is none."""
    if node.op == "call_module":
        return model.get_submodule(str(node.target))
    name = str(getattr(node.target, "__name__", node.target))
    known = node.op == "call_method" or node.target in (getattr(F, name, None), getattr(torch, name, None))
    rest = (*node.args[1:], *node.kwargs.values())
    if not known or name not in _MODULES or any(isinstance(a, fx.Node) for a in rest):
        return None
    if name in ("silu", "gelu", "relu6", "hardswish", "mish") and len(node.args) > 1:
        return None  # positions differ between function and module
    return _MODULES[name](*node.args[1:], **{k: v for k, v in node.kwargs.items() if k != "input"})


def _apply(graph: fx.Graph, rewrite: Rewrite) -> None:
    """One call in the place of the activation's, the others erased."""
    with graph.inserting_before(rewrite.act):
        added = () if rewrite.residual is None else (rewrite.residual,)
        call = graph.call_module(str(rewrite.norm.target), (rewrite.norm.args[0], *added))
    rewrite.act.replace_all_uses_with(call)
    for node in (rewrite.act, rewrite.addition, rewrite.norm):
        if node is not None:
            graph.erase_node(node)


def _fill(target: nn.Module, source: nn.Module) -> None:
    """Give a graph module what its code does not use: the state dict stays whole and in order."""
    target._parameters = dict(source._parameters)
    target._buffers = dict(source._buffers)
    target._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
    ordered = {}
    for name, child in source._modules.items():
        own = target._modules.get(name)
        if own is None or child is None:
            own = child
        elif own is not child:
            _fill(own, child)
        ordered[name] = own
    target._modules = ordered | {k: v for k, v in target._modules.items() if k not in ordered}


def replace_everywhere(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`, under every name that this has."""
    old = model.get_submodule(name)
    for alias in [other for other, found in model.named_modules(remove_duplicate=False) if found is old]:
        parent, _, last = alias.rpartition(".")
        model.get_submodule(parent)._modules[last] = module


def copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Training modes by name."""
    modes = {name: module.training for name, module in source.named_modules()}
    for name, module in target.named_modules():
        module.training = modes.get(name, module.training)
