"""Named layers as graphs.

A name gives the layer as the EvoNorm space writes it: one expression, then weight and bias per channel, with the
authors' constants. A variant gives the layer exactly as a library has it:

* `timm`: EvoNorm-B keeps unbiased running variances, and B0 has eps 1e-3; FRN's eps is 1e-5.
* `torch`: weight and bias stand between normalisation and activation as v1 and v0, and nothing follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import match, nearest
from search_spaces.layers.formula import parse_formula
from search_spaces.layers.graph import LayerGraph

_EVONORM = "Liu, Brock, Simonyan and Le, Evolving Normalization-Activation Layers, NeurIPS 2020, arXiv 2004.02967"
_RELEASE = f"{_EVONORM}; as the authors released it (tensorflow/tpu, models/official/resnet)"
_TIMM = f"{_EVONORM}; as in timm 1.0.31, timm.layers.evo_norm"
_RELU = "Nair and Hinton, Rectified Linear Units Improve Restricted Boltzmann Machines, ICML 2010"
_SWISH = "Ramachandran, Zoph and Le, Searching for Activation Functions, 2017, arXiv 1710.05941"
_BATCH = "Ioffe and Szegedy, Batch Normalization, ICML 2015, arXiv 1502.03167, algorithms 1 and 2"
_LAYER = "Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv 1607.06450, equation 3"
_INSTANCE = "Ulyanov, Vedaldi and Lempitsky, Instance Normalization: The Missing Ingredient for Fast Stylization, 2016"
_GROUP = "Wu and He, Group Normalization, ECCV 2018, arXiv 1803.08494, equation 7"
_FRN = "Singh and Krishnan, Filter Response Normalization Layer, CVPR 2020, arXiv 1911.09737"


@dataclass(frozen=True)
class NamedLayer:
    """A published layer.

    eps: inside the root of every rms and std; None keeps the formula's own. settings: fields of LayerGraph that
    differ from its defaults. variants: by name, the fields of this class that are different there. params: what a
    library's parameters are called here, where the names differ.
    """

    formula: str
    source: str
    eps: float | None = 1e-5
    settings: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    params: str = ""

    def graph(self, **settings: Any) -> LayerGraph:
        """The layer; `settings` replace its own."""
        graph = parse_formula(self.formula, **{**self.settings, **settings})
        return graph if self.eps is None else with_moment_eps(graph, self.eps)


def with_moment_eps(graph: LayerGraph, eps: float) -> LayerGraph:
    """The graph with `eps` inside the root of every rms and std."""
    nodes = (replace(node, eps=eps) if node.op in ("rms", "std") else node for node in graph.nodes)
    return replace(graph, nodes=tuple(nodes))


_FOUND = "nasforge's own search on CIFAR-10 at 16x16, 2026 (docs/layer-search.md)"
_UNBIASED = {"unbiased": True}
_NO_AFFINE = {"affine": False}
_AFFINE_INSIDE = "v1 is the weight and v0 the bias"


def _normalized(axes: str) -> str:
    return f"(x - mean[{axes}](x)) / std[{axes}](x)"


def _relu(axes: str, source: str) -> NamedLayer:
    """A normalisation over `axes`, then ReLU."""
    settings = _UNBIASED if axes == "batch" else {}
    inside = {"formula": f"max(v1 * ({_normalized(axes)}) + v0, 0)", "settings": {**settings, **_NO_AFFINE}}
    inside["params"] = _AFFINE_INSIDE
    return NamedLayer(
        f"max({_normalized(axes)}, 0)", f"{source}; {_RELU}", settings=settings, variants={"torch": inside}
    )


def _silu(axes: str, source: str) -> NamedLayer:
    """A normalisation over `axes`, then SiLU."""
    settings = _UNBIASED if axes == "batch" else {}
    inside = {
        "formula": f"n = v1 * ({_normalized(axes)}) + v0; n * sigmoid(n)",
        "settings": {**settings, **_NO_AFFINE},
        "params": _AFFINE_INSIDE,
    }
    formula = f"n = {_normalized(axes)}; n * sigmoid(n)"
    return NamedLayer(formula, f"{source}; {_SWISH}", settings=settings, variants={"torch": inside})


def _activation(formula: str, source: str, torch_formula: str = "") -> NamedLayer:
    torch = {"formula": torch_formula or formula, "settings": _NO_AFFINE}
    return NamedLayer(formula, source, eps=None, variants={"torch": torch})


def _evonorm(formula: str, source: str, timm_eps: float = 1e-5, authors_eps: float = 1e-5) -> NamedLayer:
    timm = {"eps": timm_eps, "settings": _UNBIASED if "batch" in formula else {}, "params": "v1 is timm's v"}
    return NamedLayer(formula, source, authors_eps, variants={"timm": timm})


_S0, _S1, _S2 = (
    "x * sigmoid(v1 * x) / std[group](x)",
    "x * sigmoid(x) / std[group](x)",
    "x * sigmoid(x) / rms[group](x)",
)
_A = f"{_TIMM}, whose `a` variants differ in eps and divide by the moment even with their activation off"

CATALOG: dict[str, NamedLayer] = {
    "evonorm-b0": _evonorm("x / max(std[batch](x), v1 * x + std[instance](x))", _RELEASE, timm_eps=1e-3),
    "evonorm-b1": _evonorm("x / max(std[batch](x), (x + 1) * rms[instance](x))", _TIMM),
    "evonorm-b2": _evonorm("x / max(std[batch](x), rms[instance](x) - x)", _TIMM),
    "evonorm-s0": _evonorm(_S0, _RELEASE),
    "evonorm-s1": _evonorm(_S1, _TIMM),
    "evonorm-s2": _evonorm(_S2, _TIMM),
    "evonorm-s0a": _evonorm(_S0, _A, 1e-3, 1e-3),
    "evonorm-s1a": _evonorm(_S1, _A, 1e-3, 1e-3),
    "evonorm-s2a": _evonorm(_S2, _A, 1e-3, 1e-3),
    "bn-relu": _relu("batch", _BATCH),
    "bn-silu": _silu("batch", _BATCH),
    "gn-relu": _relu("group", _GROUP),
    "gn-silu": _silu("group", _GROUP),
    "ln-relu": _relu("layer", _LAYER),
    "in-relu": _relu("instance", _INSTANCE),
    "frn-tlu": NamedLayer(
        # max(weight n + bias, v0) with the affine behind it: the same functions where the published weight is positive
        "max(x / rms[instance](x), v0)",
        _FRN,
        eps=1e-6,
        variants={
            "timm": {
                "formula": "max(v1 * (x / rms[instance](x)) + v0, 0)",
                "eps": 1e-5,
                "params": "v1 is the weight, v0 the bias minus tau, bias is tau, and weight stays 1",
            }
        },
    ),
    "batch-norm": NamedLayer(_normalized("batch"), _BATCH, settings=_UNBIASED, variants={"torch": {}}),
    "layer-norm": NamedLayer(_normalized("layer"), _LAYER, variants={"torch": {}}),
    "instance-norm": NamedLayer(_normalized("instance"), _INSTANCE, variants={"torch": {"settings": _NO_AFFINE}}),
    "group-norm": NamedLayer(_normalized("group"), _GROUP, variants={"torch": {}}),
    "rms-norm": NamedLayer(
        "x / rms[layer](x)",
        "Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019, arXiv 1910.07467, equation 4",
        eps=1e-6,
        variants={"torch": {"eps": 2.0**-23}},  # of float32, where torch is given none
    ),
    "maxtanh-rms": NamedLayer("max(x, tanh(x)) / rms[batch](x)", _FOUND),
    "relu": _activation("max(x, 0)", _RELU),
    "silu": _activation("x * sigmoid(v1 * x)", _SWISH, "x * sigmoid(x)"),
    "gelu": _activation(
        "x * (1 + erf(x / sqrt[eps=0](1 + 1))) / (1 + 1)",
        "Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, arXiv 1606.08415, section 2",
    ),
}
_OVER_CHANNELS = {"[layer]": "[channel]", "[group]": "[channel-group]"}
TOKENS = "-tokens"


def names() -> list[str]:
    """The names that `layer` knows. Those with `-tokens` take their statistics at each position on its own."""
    return [
        *CATALOG,
        *(name + TOKENS for name, named in CATALOG.items() if any(a in named.formula for a in _OVER_CHANNELS)),
    ]


def named_layer(name: str, variant: str | None = None) -> NamedLayer:
    """What the catalogue says about a layer. Errors: UserError with the nearest name or variant."""
    name = match(name, names(), "a layer")
    named = CATALOG[name.removesuffix(TOKENS)]
    if variant is not None:
        if variant not in named.variants:
            known = ["none", *named.variants]
            raise UserError(variant, f"a variant of {name} ({one_of(known)})", nearest(variant, named.variants))
        named = replace(named, **dict(named.variants[variant]))
    if name.endswith(TOKENS):
        formula = named.formula
        for images, tokens in _OVER_CHANNELS.items():
            formula = formula.replace(images, tokens)
        named = replace(named, formula=formula)
    return named


def layer(name: str, variant: str | None = None, *, eps: float | None = None, **settings: Any) -> LayerGraph:
    """The graph of a named layer.

    variant: None, "timm" or "torch" (see above). eps: inside the roots of rms and std instead of the layer's own.
    settings: affine, groups, group_size, momentum, unbiased. Errors: UserError with the nearest name.
    """
    named = named_layer(name, variant)
    known = [f.name for f in fields(LayerGraph) if f.name not in ("nodes", "output")]
    for key in settings:
        if key not in known:
            raise UserError(key, f"a setting of a layer ({one_of(known)})", nearest(key, known))
    graph = named.graph(**settings)
    return graph if eps is None else with_moment_eps(graph, eps)
