"""CAP (context-aware pre-training of a GIN) and what stands beside it: controls and encoders from scratch."""

from __future__ import annotations

from dataclasses import dataclass

from predictors.neural.predictor import NeuralPredictor, NeuralSettings


@dataclass(frozen=True)
class GinSettings(NeuralSettings):
    """NeuralSettings with CAP's encoder."""

    encoder: str = "gin"


@dataclass(frozen=True)
class CapSettings(GinSettings):
    """NeuralSettings of CAP: pre-trained on contexts, all weights fine-tuned."""

    mode: str = "full"


class Gin(NeuralPredictor):
    """CAP's GIN from scratch: 3 layers of width 128, undirected, BPR loss (the control without pre-training)."""

    kind = "gin"
    Settings = GinSettings


class Cap(NeuralPredictor):
    """CAP: the GIN after context-aware pre-training on the unlabelled graphs given to `fit`.

    Ji, Feng and Sun, CAP: A Context-Aware Neural Predictor for NAS, IJCAI 2024. Departures from the released code:
    centres are drawn anew every epoch, edges are undirected in both stages, padding has an id of its own, and the score
    is scaled with low dropout (score="released" for theirs).
    """

    kind = "cap"
    Settings = CapSettings


@dataclass(frozen=True)
class GmaeSettings(GinSettings):
    """NeuralSettings of the masked-operation control."""

    mode: str = "full"
    pretraining: str = "masked"


class Gmae(NeuralPredictor):
    """The GIN after masked-operation pre-training: the control of GMAE-NAS (Jing, Xu and Li, IJCAI 2022)."""

    kind = "gmae"
    Settings = GmaeSettings


class TwoDirection(NeuralPredictor):
    """Separate forward and backward messages with residuals, from scratch."""

    kind = "two-direction"
    Settings = NeuralSettings


@dataclass(frozen=True)
class NnFormerSettings(NeuralSettings):
    """NeuralSettings with attention to neighbours and siblings."""

    encoder: str = "nn-former"


class NnFormer(NeuralPredictor):
    """Neighbour-aware transformer with messages in its feed-forward part, after NN-Former (Xu and others, CVPR 2025);
    width 128 and 3 layers by default, from scratch."""

    kind = "nn-former"
    Settings = NnFormerSettings


@dataclass(frozen=True)
class GraphTransformerSettings(NeuralSettings):
    """NeuralSettings with full attention and Laplacian positions."""

    encoder: str = "graph-transformer"


class GraphTransformer(NeuralPredictor):
    """Transformer over all nodes with Laplacian positions (Dwivedi and Bresson 2021), from scratch."""

    kind = "graph-transformer"
    Settings = GraphTransformerSettings


@dataclass(frozen=True)
class FeatureDistilledSettings(NeuralSettings):
    """NeuralSettings of feature distillation: embedding and first block stay as pre-trained. Batches of 50 and fewer
    graphs per pre-training step than CAP's cost nothing in rank correlation (docs/predictors.md) and save most of the
    time."""

    mode: str = "partial"
    pretraining: str = "features"
    pretrain_batch: int = 256
    least_batch: int = 50


class FeatureDistilled(NeuralPredictor):
    """The two-direction encoder after learning the path features of the unlabelled graphs given to `fit`."""

    kind = "feature-distilled"
    Settings = FeatureDistilledSettings
