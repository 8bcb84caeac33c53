"""Adversarial images within an L-infinity ball: projected gradient descent and the fast gradient sign method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from search_spaces.common.errors import RunError, UserError, one_of
from search_spaces.common.names import canonical, match, nearest

NAMES = ("pgd", "fgsm")
_FRACTIONS = ("epsilon", "step_size")
_COUNTS = ("steps", "restarts", "count")
_OPTIONS = {"pgd": (*_FRACTIONS, *_COUNTS), "fgsm": ("epsilon", "count")}
_EXPECTED = {"epsilon": "a distance of pixels from 0 to 1", "step_size": "a positive distance of pixels up to 1"}


@dataclass(frozen=True)
class Attack:
    """An attack on images with pixels from 0 to 1.

    name: `pgd` (Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, section 2.1) or
    `fgsm` (Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples, section 4): a single step of
    size epsilon from the image itself. epsilon: the largest change of a pixel. restarts: random starts, the worst of
    which counts. count: how many images are attacked (None: all). Errors: UserError for values out of range.
    """

    name: str = "pgd"
    epsilon: float = 8 / 255
    step_size: float = 2 / 255
    steps: int = 10
    restarts: int = 1
    count: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", match(self.name, NAMES, "an attack"))
        if self.name == "fgsm":
            for option, value in (("step_size", self.epsilon), ("steps", 1), ("restarts", 1)):
                given = getattr(self, option)
                if given not in (value, Attack.__dataclass_fields__[option].default):
                    raise UserError(f"{option}={given}", "no such option of fgsm, which is one step", "pgd")
                object.__setattr__(self, option, value)
        if not 0 <= self.epsilon <= 1:
            raise UserError(f"epsilon={self.epsilon}", _EXPECTED["epsilon"])
        if self.name == "pgd" and not 0 < self.step_size <= 1:
            raise UserError(f"step_size={self.step_size}", _EXPECTED["step_size"])
        for option in _COUNTS:
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"{option}={value}", "at least 1")

    def describe(self) -> str:
        """One line: `pgd, epsilon 8/255, 10 steps of 2/255`."""
        if self.name == "fgsm":
            return f"fgsm, epsilon {_pixels(self.epsilon)}"
        again = f", {self.restarts} restarts" if self.restarts > 1 else ""
        return f"pgd, epsilon {_pixels(self.epsilon)}, {self.steps} steps of {_pixels(self.step_size)}{again}"


def parse_attack(text: str) -> Attack:
    """`pgd`, `fgsm`, or with options: `pgd:epsilon=4/255,steps=20`. Errors: UserError with the nearest choice."""
    name, _, rest = text.partition(":")
    attack = Attack(match(name, NAMES, "an attack"))
    known = _OPTIONS[attack.name]
    values: dict[str, float | int] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        option = canonical(key).replace("-", "_")
        if option not in known:
            raise UserError(key.strip(), f"an option of {attack.name} ({one_of(known)})", nearest(option, known))
        if not equals:
            raise UserError(item, "an option as NAME=VALUE")
        values[option] = _number(option, value.strip())
    if attack.name == "fgsm":
        return Attack("fgsm", epsilon=float(values.get("epsilon", attack.epsilon)), count=_whole(values.get("count")))
    return replace(attack, **values)  # type: ignore[arg-type]


def _number(option: str, text: str) -> float | int:
    try:
        return float(Fraction(text)) if option in _FRACTIONS else int(text)
    except (ValueError, ZeroDivisionError):
        kind = f"{_EXPECTED[option]}, such as 4/255" if option in _FRACTIONS else "a whole number"
        raise UserError(f"{option}={text}", kind) from None


def _whole(value: float | int | None) -> int | None:
    return None if value is None else int(value)


def _pixels(value: float) -> str:
    levels = 255 * value
    return f"{round(levels)}/255" if math.isclose(levels, round(levels), abs_tol=1e-9) else f"{value:g}"


def pixels(images: Tensor) -> Tensor:
    """Images as float32 with pixels from 0 to 1: uint8 is divided by 255. Errors: UserError for other values."""
    found = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    low, high = found.min().item(), found.max().item()
    if low < 0 or high > 1:
        raise UserError(f"pixels from {low:.3g} to {high:.3g}", "images with pixels from 0 to 1, to attack them")
    return found


def perturb(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, attack: Attack, *, generator: torch.Generator
) -> Tensor:
    """Images [B, C, H, W] with pixels from 0 to 1, changed by at most `epsilon` so that the cross-entropy grows.

    model: pixels -> logits [B, classes], normalising inside, in evaluation mode; no gradient reaches its parameters'
    `grad`. generator: on the CPU, for the random starts. Of several restarts each image keeps one that is classified
    wrongly, then the one of the highest loss. Errors: RunError if the model passes no gradient to its input.
    """
    best = images.clone()
    best_score: Tensor | None = None
    for _ in range(attack.restarts):
        found = _one_run(model, images, labels, attack, generator)
        if attack.restarts == 1:
            return found
        with torch.no_grad():
            logits = model(found).float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        # A squashed loss below 1 orders within right and within wrong answers.
        score = (logits.argmax(1) != labels).to(loss.dtype) + loss / (1 + loss)
        better = torch.ones_like(score, dtype=torch.bool) if best_score is None else score > best_score
        best[better] = found[better]
        best_score = score if best_score is None else torch.maximum(score, best_score)
    return best


def _one_run(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, attack: Attack, generator: torch.Generator
) -> Tensor:
    low, high = (images - attack.epsilon).clamp(min=0), (images + attack.epsilon).clamp(max=1)
    current = images.detach()
    if attack.name == "pgd":
        # Drawn on the CPU, so that every device starts from the same images.
        noise = torch.rand(images.shape, generator=generator).to(images) * 2 - 1
        current = (current + attack.epsilon * noise).clamp(low, high)
    for _ in range(attack.steps):
        current = current.detach().requires_grad_()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(model(current), labels, reduction="sum")
            if not loss.requires_grad:
                raise RunError("the model passes no gradient to its images: it cannot be attacked by gradients")
            (gradient,) = torch.autograd.grad(loss, [current])
        current = (current.detach() + attack.step_size * gradient.sign()).clamp(low, high)
    return current.detach()
