"""Special functions as lines of Triton, float32, from operations that GPUs and the interpreter both have.

Triton's own sine spills a table to local memory for huge arguments, and libdevice does not run in the interpreter.
{0}, {1}: arguments; {t}: a fresh name; the last line is the value.
"""

from __future__ import annotations

import math

NAN = "propagate_nan=tl.PropagateNan.ALL"


def _polynomial(at: str, coefficients: list[float]) -> str:
    """Horner's form, the constant first."""
    text = repr(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        text = f"({coefficient!r} + {at} * {text})"
    return text


# pi / 2 in two parts, the first of 24 bits: its products with whole numbers below 2^29 are exact in float64.
_HALF_PI_HIGH = math.ldexp(math.floor(math.ldexp(math.pi / 2, 23)), -23)
_HALF_PI_LOW = (math.pi / 2 - _HALF_PI_HIGH) + 6.123233995736766e-17  # what float64 leaves of pi / 2
# {t}_r in [-pi/4, pi/4] and its quarter turn {t}_q from 0 to 3. Above 2^29 the spacing of float32 is 64, ten periods:
# the sine of such a number says nothing, and is 0 here (NaN of infinities).
_QUARTER_TURNS = (
    "{t}_w = ({0}).to(tl.float64)",
    f"{{t}}_n = tl.floor({{t}}_w * {2 / math.pi!r} + 0.5)",
    f"{{t}}_r = ({{t}}_w - {{t}}_n * {_HALF_PI_HIGH!r} - {{t}}_n * {_HALF_PI_LOW!r}).to(tl.float32)",
    "{t}_q = ({t}_n - 4.0 * tl.floor(0.25 * {t}_n)).to(tl.float32)",
    f"{{t}}_r = tl.where(tl.abs({{0}}) < {2.0**29!r}, {{t}}_r, {{0}} - {{0}})",
    f"{{t}}_q = tl.where(tl.abs({{0}}) < {2.0**29!r}, {{t}}_q, 0.0)",
    "{t}_z = {t}_r * {t}_r",  # Taylor's series; what they leave out is below 2e-9
    "{t}_s = {t}_r * " + _polynomial("{t}_z", [(-1) ** k / math.factorial(2 * k + 1) for k in range(5)]),
    "{t}_c = " + _polynomial("{t}_z", [(-1) ** k / math.factorial(2 * k) for k in range(6)]),
    "{t}_odd = ({t}_q == 1.0) | ({t}_q == 3.0)",
)
SIN = (
    *_QUARTER_TURNS,
    "{t}_y = tl.where({t}_odd, {t}_c, {t}_s)",
    "tl.where({t}_q >= 2.0, -{t}_y, {t}_y)",
)
COS = (
    *_QUARTER_TURNS,
    "{t}_y = tl.where({t}_odd, {t}_s, {t}_c)",
    "tl.where(({t}_q == 1.0) | ({t}_q == 2.0), -{t}_y, {t}_y)",
)

# atan a = pi/2 - atan 1/a, and atan a = pi/4 + atan (a - 1) / (a + 1), until Taylor's series is short.
_TAN_EIGHTH = math.tan(math.pi / 8)
ATAN = (
    "{t}_a = tl.abs({0})",
    f"{{t}}_b = tl.minimum({{t}}_a, 1.0, {NAN}) / tl.maximum({{t}}_a, 1.0, {NAN})",
    f"{{t}}_u = tl.where({{t}}_b > {_TAN_EIGHTH!r}, ({{t}}_b - 1.0) / ({{t}}_b + 1.0), {{t}}_b)",
    "{t}_z = {t}_u * {t}_u",
    "{t}_y = {t}_u * " + _polynomial("{t}_z", [(-1) ** k / (2 * k + 1) for k in range(10)]),
    f"{{t}}_y = tl.where({{t}}_b > {_TAN_EIGHTH!r}, {math.pi / 4!r} + {{t}}_y, {{t}}_y)",
    f"{{t}}_y = tl.where({{t}}_a > 1.0, {math.pi / 2!r} - {{t}}_y, {{t}}_y)",
    "tl.where({0} < 0.0, -{t}_y, {t}_y)",
)

_NEAR = 12.0  # up to which the Bessel functions' power series is used, and from which the asymptotic one


def _bessel(order: int) -> tuple[str, ...]:
    """e^-|a| times the modified Bessel function of order 0 or 1 (Abramowitz and Stegun 1964, 9.6.10 and 9.7.1)."""
    series = [1 / (math.factorial(k) * math.factorial(k + order)) for k in range(20)]
    tail = [1.0]
    for k in range(1, 9):
        tail.append(tail[-1] * ((2 * k - 1) ** 2 - 4 * order) / (8 * k))
    near = "tl.exp(-{t}_a) * " + ("0.5 * {t}_a * " if order else "") + _polynomial("{t}_z", series)
    return (
        f"{{t}}_a = tl.minimum(tl.abs({{0}}), {_NEAR}, {NAN})",
        "{t}_z = 0.25 * {t}_a * {t}_a",
        f"{{t}}_w = 1.0 / tl.maximum(tl.abs({{0}}), {_NEAR}, {NAN})",
        f"{{t}}_far = tl.sqrt({{t}}_w) * {1 / math.sqrt(2 * math.pi)!r} * " + _polynomial("{t}_w", tail),
        f"{{t}}_y = tl.where(tl.abs({{0}}) < {_NEAR}, {near}, {{t}}_far)",
        "tl.where({0} < 0.0, -{t}_y, {t}_y)" if order else "{t}_y",
    )


I0E, I1E = _bessel(0), _bessel(1)

# The rules of IEEE 754: 1 where the exponent is 0 or the base 1, signs of odd powers, NaN for roots of negatives.
POW = (
    "{t}_a = tl.abs({0})",
    "{t}_m = tl.exp({1} * tl.log({t}_a))",
    "{t}_m = tl.where(({1} == 0.0) | ({0} == 1.0) | (({t}_a == 1.0) & (tl.abs({1}) == float('inf'))), 1.0, {t}_m)",
    "{t}_whole = tl.floor({1}) == {1}",
    "{t}_odd = {t}_whole & ({1} - 2.0 * tl.floor(0.5 * {1}) == 1.0)",
    "{t}_minus = ({0} < 0.0) | (({0} == 0.0) & (1.0 / {0} < 0.0))",
    "{t}_m = tl.where({t}_minus & {t}_odd, -{t}_m, {t}_m)",
    "tl.where(({0} < 0.0) & ({t}_a < float('inf')) & ({t}_whole == 0) & ({1} == {1}), float('nan'), {t}_m)",
)
