"""Where a model normalises: every normalisation, the activation behind it, and its place in residual blocks."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn import functional as F

from search_spaces.layers.module import GraphLayer

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NO_ACTIVATIONS = ("MultiheadAttention", "GLU", "Softmin", "Softmax", "Softmax2d", "LogSoftmax")
ACTIVATIONS = tuple(
    getattr(nn.modules.activation, name) for name in nn.modules.activation.__all__ if name not in _NO_ACTIVATIONS
)
_FUNCTIONS = (
    *("relu", "relu_", "relu6", "leaky_relu", "silu", "gelu", "elu", "selu", "celu", "mish", "hardswish"),
    *("hardtanh", "hardsigmoid", "softplus", "sigmoid", "sigmoid_", "tanh", "tanh_"),
)
FUNCTIONS = {getattr(home, name) for home in (F, torch) for name in _FUNCTIONS if hasattr(home, name)}
ADDITIONS = {operator.add, operator.iadd, torch.add}
POOLS = tuple(getattr(nn, f"Adaptive{kind}Pool{d}d") for kind in ("Avg", "Max") for d in (1, 2, 3))
POOL_FUNCTIONS = {getattr(F, f"adaptive_{kind}_pool{d}d") for kind in ("avg", "max") for d in (1, 2, 3)}
POOL_FUNCTIONS |= {torch.mean, torch.amax}
_DROPOUTS = (nn.Identity, nn.modules.dropout._DropoutNd)
_LINEAR = (*_DROPOUTS, *NORMS, nn.modules.conv._ConvNd, nn.Linear, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


@dataclass(frozen=True)
class Site:
    """A normalisation in a model.

    norm, act: module names; act "" where none follows. act_calls: how often that module is called in all. function:
    the name of an activation that is called as a function. obstacle: why nothing can be done, or "". found_by: `trace`
    or `order`. norm_node, act_node: the calls in the traced graph of the whole model.
    """

    norm: str
    channels: int
    act: str = ""
    place: str = "lone"
    act_calls: int = 1
    function: str = ""
    obstacle: str = ""
    found_by: str = "trace"
    norm_node: fx.Node | None = None
    act_node: fx.Node | None = None


def channels_of(norm: nn.Module) -> tuple[int, str]:
    """(channels, layout) of the inputs that a normalisation takes; 0 channels where it does not know them yet."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels, "channels-first"
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        shape = norm.normalized_shape
        # torchvision's and timm's LayerNorm2d take the channels first.
        last = len(shape) == 1 and "2d" not in type(norm).__name__.lower()
        return int(shape[0]), "tokens" if last else "channels-first"
    return int(norm.num_features), "channels-first"  # type: ignore[arg-type]


class _Tracer(fx.Tracer):
    """Norms, and modules that hold no others, are called; all else is looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, (*NORMS, GraphLayer)) or next(m.children(), None) is None
        return whole or super().is_leaf_module(m, module_qualified_name)


def sites_by_trace(model: nn.Module, activations: tuple[type[nn.Module], ...] = ()) -> tuple[list[Site], fx.Graph]:
    """All normalisations in the order of their calls, then those that are never called, and the traced graph.

    Errors: whatever the model's code raises when it is traced.
    """
    graph = _Tracer().trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    called = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    calls = Counter(id(module) for module in called.values())
    norms = {node: module for node, module in called.items() if isinstance(module, NORMS)}
    last = _ends_of_blocks(graph, called, norms)
    sites = []
    seen: set[int] = set()
    for node, module in norms.items():
        name = str(node.target)
        channels, _ = channels_of(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        obstacle = _obstacle(name, channels)
        if calls[id(module)] > 1:
            obstacle = f"called {calls[id(module)]} times"
        site = Site(name, channels, obstacle=obstacle, norm_node=node)
        users = list(node.users)
        behind = users[0] if len(users) == 1 else None
        follower = called.get(behind) if behind is not None else None
        end = node
        if fused_activation(module, activations):
            site = replace(site, place="pair")
        elif isinstance(follower, (*ACTIVATIONS, *activations)) and behind is not None:
            site = replace(site, act=str(behind.target), act_calls=calls[id(follower)], place="pair", act_node=behind)
            end = behind
        elif behind is not None and _activation_function(behind):
            site = replace(site, function=_activation_function(behind), place="pair", act_node=behind)
            end = behind
        elif node in last:
            site = replace(site, place="last")
        if _pooled(end, called):
            site = replace(site, place="final")
        sites.append(site)
    for name, module in model.named_modules():
        if isinstance(module, NORMS) and id(module) not in seen:
            sites.append(Site(name, channels_of(module)[0], obstacle="never called"))
    return sites, graph


def sites_in_parts(
    model: nn.Module, activations: tuple[type[nn.Module], ...] = (), trust_order: bool = False
) -> list[Site]:
    """All normalisations of a model that cannot be traced as a whole: its largest parts that can be, and the order of
    children elsewhere, which is sure in an nn.Sequential and taken as sure everywhere with `trust_order`."""
    registered = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    sites: list[Site] = []
    seen: set[int] = set()

    def add(site: Site) -> None:
        module = model.get_submodule(site.norm)
        if id(module) in seen:
            return
        seen.add(id(module))
        if registered[id(module)] > 1 and not site.obstacle:
            site = replace(site, obstacle="registered under several names")
        if site.act and registered[id(model.get_submodule(site.act))] > 1 and not site.obstacle:
            site = replace(site, obstacle=f"its activation {site.act} is registered under several names")
        sites.append(site)

    def visit(name: str, module: nn.Module) -> None:
        inner = f"{name}." if name else ""
        if isinstance(module, NORMS):
            add(Site(name, channels_of(module)[0], obstacle=_obstacle(name, channels_of(module)[0])))
            return
        if not any(isinstance(m, NORMS) for m in module.modules()):
            return
        try:
            parts = sites_by_trace(module, activations)[0] if name else None
        except Exception:  # whatever a model's own code raises when it meets symbolic values
            parts = None
        if parts is not None:
            for site in parts:
                act = inner + site.act if site.act else ""
                add(replace(site, norm=inner + site.norm, act=act, norm_node=None, act_node=None))
            return
        children = list(module.named_children())
        for (child_name, child), (next_name, follower) in zip(children, [*children[1:], ("", None)], strict=True):
            if not isinstance(child, NORMS):
                visit(inner + child_name, child)
                continue
            channels, _ = channels_of(child)
            site = Site(inner + child_name, channels, obstacle=_obstacle(child_name, channels), found_by="order")
            if fused_activation(child, activations):
                site = replace(site, place="pair")
            elif isinstance(follower, (*ACTIVATIONS, *activations)):
                site = replace(site, act=inner + next_name, place="pair")
            if not (site.obstacle or isinstance(module, nn.Sequential) or trust_order):
                site = replace(site, obstacle=f"what follows it in {type(module).__name__} cannot be traced")
            add(site)

    visit("", model)
    return sites


def fused_activation(module: nn.Module, activations: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether a normalisation holds its activation itself, as timm's BatchNormAct2d and GroupNormAct do."""
    return isinstance(getattr(module, "act", None), (*ACTIVATIONS, *activations))


def _obstacle(name: str, channels: int) -> str:
    if not name:
        return "it is the model itself"
    return "" if channels else "its channels are not known before the first input"


def _activation_function(node: fx.Node) -> str:
    """The name of the activation that a node calls as a function or method, or ""."""
    if node.op == "call_function" and node.target in FUNCTIONS:
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target) if node.op == "call_method" and node.target in _FUNCTIONS else ""


def _pooled(node: fx.Node, called: dict[fx.Node, nn.Module]) -> bool:
    """Whether a value goes into a global pooling and nowhere else."""
    node = _past_dropout(node, called)
    users = list(node.users)
    if len(users) != 1:
        return False
    user = users[0]
    pools = isinstance(called.get(user), POOLS)
    return pools or user.target in POOL_FUNCTIONS or (user.op == "call_method" and user.target == "mean")


def _past_dropout(node: fx.Node, called: dict[fx.Node, nn.Module]) -> fx.Node:
    """The last of the identities and dropouts that alone take a value."""
    while len(node.users) == 1 and isinstance(called.get(next(iter(node.users))), _DROPOUTS):
        node = next(iter(node.users))
    return node


def _ends_of_blocks(graph: fx.Graph, called: dict[fx.Node, nn.Module], norms: Collection[fx.Node]) -> set[fx.Node]:
    """The last norms of residual blocks: added to the block's input, or to a linear image of it, with another norm
    before them inside the block; and the norms within those linear images."""
    number = {node: 1 << index for index, node in enumerate(graph.nodes)}
    ancestors: dict[fx.Node, int] = {}  # as bits
    for node in graph.nodes:
        ancestors[node] = 0
        for source in node.all_input_nodes:
            ancestors[node] |= number[source] | ancestors[source]
    ends = {_past_dropout(node, called): node for node in norms}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        adds = node.target in ADDITIONS or (node.op == "call_method" and node.target in ("add", "add_"))
        sources = [source for source in node.args if isinstance(source, fx.Node)]
        if not adds or len(sources) != 2:
            continue
        for branch, shortcut in (sources, sources[::-1]):
            norm = ends.get(branch)
            if norm is None:
                continue
            passed = []
            while not number[shortcut] & ancestors[norm] and isinstance(called.get(shortcut), _LINEAR):
                passed.append(shortcut)
                shortcut = shortcut.all_input_nodes[0]
            inside = (o for o in norms if number[o] & ancestors[norm] and number[shortcut] & ancestors[o])
            if number[shortcut] & ancestors[norm] and any(inside):
                found |= {norm, *(other for other in passed if other in norms)}
    return found
