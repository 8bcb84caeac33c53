"""Put a layer into a model of one's own: its normalisation-activation pairs are found and swapped."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx, nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest
from search_spaces.layers.graph import LEAVES, LayerGraph, Node, X
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.sites import Site, channels_of, sites_by_trace, sites_in_parts

LayerSource = LayerGraph | Callable[[int], nn.Module]
ACTIONS = ("keep", "layer", "affine", "norm-only")


@dataclass(frozen=True)
class ReplacePolicy:
    """What happens where. Pairs always become the layer.

    Every place takes `keep`, `layer`, `affine` (weight and bias only), `norm-only` (the layer's normalisation without
    its activation), or a LayerGraph or factory of its own. lone: normalisations with no activation behind. last: the
    last one of a residual block, and that of its shortcut; EvoNorm's authors keep only the affine there. final: the
    one before the global pooling. zero_init_last: the weight of a `last` layer begins as zeros. keep: patterns of
    module names to leave alone, such as `stem.*`. activations: further classes of activation modules. trust_order: in
    parts that cannot be traced, modules registered one after the other are taken to follow each other.
    """

    lone: str | LayerSource = "keep"
    last: str | LayerSource = "affine"
    final: str | LayerSource = "layer"
    zero_init_last: bool = False
    keep: tuple[str, ...] = ()
    activations: tuple[type[nn.Module], ...] = ()
    trust_order: bool = False

    def __post_init__(self) -> None:
        for action in (self.lone, self.last, self.final):
            if isinstance(action, str) and action not in ACTIONS:
                raise UserError(action, f"{one_of(ACTIONS)}, or a layer", nearest(action, ACTIONS))


@dataclass(frozen=True)
class Replacement:
    """What became of one normalisation.

    norm, act: module names; act is "" where no activation module follows. place: `pair`, `lone`, `last` or `final`.
    action: `layer`, `affine`, `norm-only`, `own` or `keep`. reason: why. found_by: `trace`, or `order` of registration
    in parts that cannot be traced.
    """

    norm: str
    act: str
    place: str
    action: str
    reason: str
    channels: int
    found_by: str

    @property
    def replaced(self) -> bool:
        """Whether the model changed here."""
        return self.action != "keep"

    def __str__(self) -> str:
        names = f"{self.norm} + {self.act}" if self.act else self.norm
        return f"{names} ({self.place}, {self.channels} channels): {self.action}, {self.reason}"


def replace_norm_act(
    model: nn.Module, layer: LayerSource, *, policy: ReplacePolicy | None = None, rewrite: bool = False
) -> tuple[nn.Module, list[Replacement]]:
    """Swap the normalisation-activation pairs of `model`, in place, for `layer`.

    layer: a LayerGraph or a factory (channels -> module). Normalisations are torch's BatchNorm, GroupNorm, LayerNorm,
    InstanceNorm and RMSNorm; an activation module that follows becomes an Identity. New layers have the device, dtype
    and mode of the old. One that is called from several places, an activation that is a function or serves elsewhere
    too, cannot be removed from a module and is reported; with `rewrite` the model is returned as a torch.fx
    GraphModule in which such calls are left out (it is fixed to the mode, training or evaluation, for functions like
    dropout that are told it). Returns the model and one Replacement for every normalisation, in order.
    Errors: UserError if the model has no normalisation, if it cannot be traced and `rewrite` is set, and if a layer
    has no `norm-only` form; the model is unchanged then.
    """
    policy = policy or ReplacePolicy()
    traced: fx.Graph | None = None
    try:
        sites, traced = sites_by_trace(model, policy.activations)
    except Exception as error:  # whatever a model's own code raises when it meets symbolic values
        if rewrite:
            raise UserError(
                type(model).__name__, f"a model that torch.fx can trace, for `rewrite` ({str(error)[:120]})"
            ) from None
        sites = sites_in_parts(model, policy.activations, policy.trust_order)
    if not sites:
        raise UserError(type(model).__name__, "a model with a normalisation (BatchNorm, GroupNorm, LayerNorm, ...)")
    chosen = [_choose(site, policy, rewrite) for site in sites]
    if not rewrite:
        chosen = _refuse_shared(model, sites, chosen)
    modules = [
        None if action == "keep" else _make(action, site, layer, policy, model)
        for site, (action, _) in zip(sites, chosen, strict=True)
    ]
    report = []
    for site, (action, reason), module in zip(sites, chosen, modules, strict=True):
        shown = action if isinstance(action, str) else "own"
        report.append(Replacement(site.norm, site.act, site.place, shown, reason, site.channels, site.found_by))
        if module is not None:
            _swap(model, site.norm, module)
            if not rewrite and site.act and _takes_activation(action):
                _swap(model, site.act, nn.Identity())
    if not rewrite or traced is None:
        return model, report
    for site, (action, _) in zip(sites, chosen, strict=True):
        if site.act_node is not None and site.norm_node is not None and _takes_activation(action):
            site.act_node.replace_all_uses_with(site.norm_node)
            traced.erase_node(site.act_node)
    rewritten = fx.GraphModule(model, traced, type(model).__name__)
    return rewritten.train(model.training), report


def without_activation(graph: LayerGraph) -> LayerGraph:
    """The normalisation inside a layer: x, minus its mean if the layer takes that, by its rms or std; then an affine.

    Errors: UserError for a layer that divides by no moment of x, or by several different ones (EvoNorm-B).
    """
    moments = {node for _, node in graph.live_nodes if node.op in ("rms", "std") and node.inputs == (X,)}
    if len(moments) != 1:
        what = "none" if not moments else " and ".join(sorted(node.name for node in moments))
        raise UserError(
            "norm-only", f"a layer with one rms or std of its input to normalise by, found {what}", "affine"
        )
    (moment,) = moments
    mean = Node("mean", (X,), moment.axes)
    centred = any(node == mean for _, node in graph.live_nodes)
    first = len(LEAVES)
    nodes = [moment, Node("div", (X, first))]
    if centred:
        nodes = [mean, Node("neg", (first,)), Node("add", (X, first + 1)), moment, Node("div", (first + 2, first + 3))]
    return replace(graph, nodes=tuple(nodes), output=first + len(nodes) - 1, affine=True)


def affine_only(graph: LayerGraph | None = None) -> LayerGraph:
    """Weight and bias per channel and nothing else."""
    return replace(graph, nodes=(), output=X, affine=True) if graph is not None else LayerGraph((), X)


def _choose(site: Site, policy: ReplacePolicy, rewrite: bool) -> tuple[str | LayerSource, str]:
    """What to do at a site, and why."""
    if site.obstacle:
        return "keep", site.obstacle
    if any(fnmatch.fnmatchcase(site.norm, pattern) for pattern in policy.keep):
        return "keep", "its name is to be kept"
    actions: dict[str, tuple[str | LayerSource, str]] = {
        "pair": ("layer", "an activation follows"),
        "lone": (policy.lone, "no activation follows"),
        "last": (policy.last, "last of a residual block"),
        "final": (policy.final, "before the global pooling"),
    }
    action, reason = actions[site.place]
    if action != "keep" and site.function and _takes_activation(action) and not rewrite:
        return "keep", f"followed by a call of {site.function}, which is no module; `rewrite` can leave it out"
    return action, reason


def _refuse_shared(
    model: nn.Module, sites: list[Site], chosen: list[tuple[str | LayerSource, str]]
) -> list[tuple[str | LayerSource, str]]:
    """Keep pairs whose activation module is called elsewhere too."""
    leaving = Counter(
        id(model.get_submodule(site.act))
        for site, (action, _) in zip(sites, chosen, strict=True)
        if site.act and _takes_activation(action)
    )
    found = []
    for site, (action, reason) in zip(sites, chosen, strict=True):
        if site.act and _takes_activation(action):
            others = site.act_calls - leaving[id(model.get_submodule(site.act))]
            if others > 0:
                reason = f"its activation {site.act} has {others} other use{'s' * (others > 1)}"
                action, reason = "keep", f"{reason}; `rewrite` can leave this one out"
        found.append((action, reason))
    return found


def _takes_activation(action: str | LayerSource) -> bool:
    """Whether what stands in for the normalisation is also the activation."""
    return action not in ("keep", "affine", "norm-only")


def _make(
    action: str | LayerSource, site: Site, layer: LayerSource, policy: ReplacePolicy, model: nn.Module
) -> nn.Module:
    """The new module, on the device and in the dtype and mode of the old."""
    old = model.get_submodule(site.norm)
    channels, layout = channels_of(old)
    source: LayerSource = layer if isinstance(action, str) else action
    graph = source if isinstance(source, LayerGraph) else None
    if action == "affine":
        source = affine_only(graph)
    elif action == "norm-only":
        if graph is None:
            raise UserError("norm-only", "a LayerGraph; a factory's activation cannot be taken away", "affine")
        source = without_activation(graph)
    if isinstance(source, LayerGraph):
        made: nn.Module = GraphLayer(source, channels, layout=layout)
    else:
        made = source(channels)
    weight = getattr(made, "weight", None)
    if site.place == "last" and policy.zero_init_last and isinstance(weight, nn.Parameter):
        nn.init.zeros_(weight)
    tensors = (t for part in (old, model) for t in (*part.parameters(), *part.buffers()) if t.is_floating_point())
    alike = next(tensors, None)
    if alike is not None:
        made.to(alike.device, alike.dtype)
    return made.train(old.training)


def _swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`, under every name that this has."""
    old = model.get_submodule(name)
    for alias in [other for other, found in model.named_modules(remove_duplicate=False) if found is old]:
        parent, _, last = alias.rpartition(".")
        setattr(model.get_submodule(parent), last, module)
