"""`fuse`: a model's layers by kernels, with the same tensors and state dict; `unfuse` undoes it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch import nn

from kernels.backend import obstacle, resolve
from kernels.layer import FusedLayer
from kernels.nodes import Unsupported
from kernels.norm_act import FUSED, FusedNorm, Moved, refusal
from kernels.rewriting import copy_modes, replace_everywhere, rewrite_of, rewritten
from search_spaces.common.errors import UserError
from search_spaces.layers.module import GraphLayer
from search_spaces.layers.sites import Site, sites_by_trace, sites_in_parts


@dataclass(frozen=True)
class Fusion:
    """What became of one place. names: of its modules. kind: `layer`, `norm` or `model`. fused, reason: whether, why.

    reason names the fused form, or says why the place was left as it was.
    """

    names: tuple[str, ...]
    kind: str
    fused: bool
    reason: str

    def __str__(self) -> str:
        return f"{' + '.join(n or 'the model' for n in self.names)}: {'fused' if self.fused else 'left'}, {self.reason}"


@dataclass(frozen=True)
class Fused:
    """A model and what `fuse` did to it for a backend; its text is the report, one place a line."""

    model: nn.Module
    report: tuple[Fusion, ...]
    backend: str = "auto"

    @property
    def count(self) -> int:
        """How many places were fused."""
        return sum(place.fused for place in self.report)

    def __str__(self) -> str:
        if not self.report:
            return "nothing to fuse: the model has no GraphLayer and no normalisation that kernels know"
        lines = [f"{self.count} of {len(self.report)} {'place' if len(self.report) == 1 else 'places'} fused"]
        if self.count and self.backend == "auto" and (here := obstacle()):
            lines.append(f"kernels cannot run here ({here}): the model runs by torch, as before it was fused")
        return "\n".join([*lines, *map(str, self.report)])


def fuse(model: nn.Module, *, inplace: bool = False, backend: str = "auto", rewrite: bool = False) -> Fused:
    """Put fused modules in the place of GraphLayers and of adjacent normalisations and activations.

    inplace: change `model` itself instead of a copy (a model that is itself one layer is always returned anew, with
    the same tensors). backend: `auto` (kernels where they can run, the layers' own code elsewhere and so on CPUs),
    `triton` (the same, but an error where no kernel can run), `reference` (the operators by torch; for tests),
    `eager` (nothing is fused), `compile` (torch.compile of the whole model). rewrite: also fuse activations that are
    functions or used in several places, and residual sums between the two, by torch.fx: the result is a GraphModule,
    never in place, in which what the model's code reads of its own attributes is fixed as it is now, and `a += b` is
    `a = a + b` (another result where the old `a` is used again under another name).

    Parameters, buffers and state dict keep their names and order. Normalisations: torch's BatchNorm, GroupNorm,
    LayerNorm and RMSNorm (the last two over one dimension), with ReLU, ReLU6, LeakyReLU, ELU, SiLU, GELU, Hardswish,
    Mish, Sigmoid or Tanh behind them. What is not sure to follow (by torch.fx, or the order in an nn.Sequential) is
    left; the report says why. Batch statistics are those of one process: convert to SyncBatchNorm before, which is
    left alone. Errors: UserError for an unknown backend, `triton` without any means to run kernels, and `rewrite`
    with `inplace` or of a model that cannot be traced alike in training and evaluation.
    """
    backend = resolve(backend)
    if rewrite and inplace:
        raise UserError("rewrite", "a copy: a rewritten model is a new GraphModule", "inplace=False")
    model = model if inplace else copy.deepcopy(model)
    if backend == "eager":
        return Fused(model, (Fusion(("",), "model", False, "as backend eager asks"),), backend)
    if backend == "compile":
        model.compile()
        return Fused(model, (Fusion(("",), "model", True, "compiled as a whole by torch.compile"),), backend)
    if rewrite:
        graph_module, report = rewritten(model, backend)
        _, layers = _fuse_layers(graph_module, backend)
        norms = [Fusion((name,), "norm", *what) for name, what in report.items()]
        return Fused(graph_module, (*layers, *norms), backend)
    pairs = _fuse_pairs(model, backend)
    model, layers = _fuse_layers(model, backend)
    return Fused(model, (*layers, *pairs), backend)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse` in place: the modules that were there before, in the present state of the tensors and modes.

    Returns the model (another object for rewritten models and for those that are one layer themselves). Errors:
    UserError for a copy of a rewritten model.
    """
    before = model.__dict__.get("_before_rewriting")
    if before is not None:
        copy_modes(model, before[0])
        return before[0]
    if hasattr(model, "_compiled_call_impl"):
        model._compiled_call_impl = None
    if isinstance(model, FusedLayer):
        return model.unfused()
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, (FusedLayer, FusedNorm, Moved))]
    for name, module in found:
        replace_everywhere(model, name, module.unfused())
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether a model has fused modules."""
    return any(isinstance(module, (FusedLayer, FusedNorm)) for module in model.modules())


def _fuse_layers(model: nn.Module, backend: str) -> tuple[nn.Module, list[Fusion]]:
    """Put a FusedLayer in the place of every GraphLayer."""
    report = []
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, GraphLayer) or isinstance(layer, FusedLayer):
            continue
        if type(layer) is not GraphLayer:
            report.append(
                Fusion((name,), "layer", False, f"no kernel for {type(layer).__name__}, whose code may differ")
            )
            continue
        try:
            fused = FusedLayer.of(layer, backend)
        except Unsupported as error:
            report.append(Fusion((name,), "layer", False, f"kernels cannot express it ({error})"))
            continue
        if name:
            replace_everywhere(model, name, fused)
        else:
            model = fused
        report.append(Fusion((name,), "layer", True, f"a layer of {layer.channels} channels"))
    return model, report


def _fuse_pairs(model: nn.Module, backend: str) -> list[Fusion]:
    """Put fused modules in the place of normalisations whose activation is a module of their own."""
    report = []
    for site in _sites(model):
        reason = site.obstacle
        if not reason and not site.act:
            found = rewrite_of(model, site)
            if isinstance(found, str):
                reason = found
            elif found.residual is not None:
                reason = f"a residual is added before {type(found.module).__name__}; `rewrite=True` can fuse both"
            else:
                reason = f"followed by a call of {site.function}, which is no module; `rewrite=True` can fuse it"
        elif not reason:
            norm, act = model.get_submodule(site.norm), model.get_submodule(site.act)
            reason = refusal(norm, act)
            if not reason and site.act_calls > 1:
                reason = f"its activation {site.act} is used {site.act_calls} times; `rewrite=True` can fuse it"
        names = (site.norm, site.act) if site.act else (site.norm,)
        if reason:
            report.append(Fusion(names, "norm", False, reason))
            continue
        fused = FUSED[type(norm)].of(norm, act, backend)
        replace_everywhere(model, site.act, Moved(act))  # first: `fused` holds the activation too
        replace_everywhere(model, site.norm, fused)
        report.append(Fusion(names, "norm", True, f"{type(norm).__name__} with {type(act).__name__}"))
    return report


def _sites(model: nn.Module) -> list[Site]:
    """The model's normalisations; what differs between training and evaluation has an obstacle."""
    modes = {module: module.training for module in model.modules()}
    found: list[dict[str, Site]] = []
    try:
        for training in (True, False):
            model.train(training)
            try:
                sites = sites_by_trace(model)[0]
            except Exception:  # whatever a model's own code raises when it meets symbolic values
                sites = sites_in_parts(model)
            found.append({site.norm: site for site in sites})
    finally:
        for module, mode in modes.items():
            module.training = mode
    first, second = found
    known = {name for name, module in model.named_modules() if isinstance(module, FusedNorm)}
    return [_agreed(site, second.get(name)) for name, site in first.items() if name not in known]


def _agreed(site: Site, other: Site | None) -> Site:
    behind = [(s.act, s.function, s.act_calls, s.obstacle) for s in (site, other) if s is not None]
    if len(behind) == 2 and behind[0] == behind[1]:
        return site
    return replace(site, obstacle="what follows it differs in training and evaluation")
