"""What a proxy is: a pure function of what the passes captured, with its formula, source and needs beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zero_cost.captured import Captured

# What can be captured (the fields of `Captured` of the same name), and which captures read labels.
NEEDS_LABELS = frozenset({"gradients", "fisher", "second_order", "batch_gradients", "sign_sums"})
FORWARD_ONLY = frozenset(
    {
        *("params", "static", "weights", "codes", "features", "logits", "synflow_forward", "zen", "curve"),
        *("inputs", "layers", "attention", "hidden", "sign_agreement"),
    }
)
WITHOUT_DATA = frozenset(
    {
        *("params", "static", "weights", "synflow", "synflow_forward", "zen", "stages"),
        *("layers", "absolute_gradients"),
    }
)


@dataclass(frozen=True)
class Proxy:
    """A training-free score.

    compute: Captured -> float or 0-d tensor, higher is better; raises NoValue where there is none.
    needs: the fields of Captured that it reads. sign: -1 where the published quantity is better when lower; `compute`
    then returns its negative. reads_labels: for those that read labels without a gradient of the loss.
    """

    name: str
    compute: Callable[[Captured], object]
    needs: tuple[str, ...]
    formula: str
    source: str
    sign: int = 1
    min_samples: int = 1
    reads_labels: bool = False

    @property
    def labels(self) -> bool:
        """Whether it needs labels."""
        return self.reads_labels or not NEEDS_LABELS.isdisjoint(self.needs)

    @property
    def backward(self) -> bool:
        """Whether it needs a backward pass."""
        return not FORWARD_ONLY.issuperset(self.needs)

    @property
    def data(self) -> bool:
        """Whether its value depends on the batch (more than on its shape)."""
        return not WITHOUT_DATA.issuperset(self.needs)


def proxy(
    name: str,
    *,
    needs: tuple[str, ...],
    formula: str,
    source: str,
    sign: int = 1,
    min_samples: int = 1,
    reads_labels: bool = False,
) -> Callable[[Callable[[Captured], object]], Proxy]:
    """Decorator that makes a Proxy of a function of Captured."""
    return lambda compute: Proxy(name, compute, needs, formula, source, sign, min_samples, reads_labels)
