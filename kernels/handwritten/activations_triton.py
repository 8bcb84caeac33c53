"""The activations of `activations.py` on float32 tiles. NaN stays NaN, as in torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    return 2.0 * tl.sigmoid(2.0 * z) - 1.0


@triton.jit
def activate(z, alpha, ACT: tl.constexpr):
    """The activation's value."""
    y = z
    if ACT == "relu":
        y = tl.where(z < 0.0, 0.0, z)
    elif ACT == "relu6":
        y = tl.where(z < 0.0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACT == "leaky-relu":
        y = tl.where(z > 0.0, z, alpha * z)
    elif ACT == "elu":
        y = tl.where(z > 0.0, z, alpha * (tl.exp(z) - 1.0))
    elif ACT == "sigmoid":
        y = tl.sigmoid(z)
    elif ACT == "tanh":
        y = tanh(z)
    elif ACT == "silu":
        y = z * tl.sigmoid(z)
    elif ACT == "gelu":
        y = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu-tanh":  # (1 + tanh u) / 2 = sigmoid(2 u)
        y = z * tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    elif ACT == "hardswish":
        y = z * tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0)) * 0.16666666666666666
    elif ACT == "mish":  # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)
        e = tl.exp(tl.where(z > 20.0, 20.0, z))
        y = z * (e * (e + 2.0) / (e * (e + 2.0) + 2.0))
    elif ACT == "powlu-gate":
        safe = tl.where(z > 1e-30, z, 1e-30)
        power = tl.exp(alpha * tl.log(safe) / (tl.sqrt(safe) + 1.0))
        y = tl.where(z > 0.0, power, z) * tl.sigmoid(z)
    return y


@triton.jit
def slope(z, alpha, ACT: tl.constexpr):
    """The activation's derivative; torch's choice where there are two."""
    d = z * 0.0 + 1.0
    if ACT == "relu":
        d = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACT == "relu6":
        d = tl.where((z <= 0.0) | (z >= 6.0), 0.0, 1.0)
    elif ACT == "leaky-relu":
        d = tl.where(z > 0.0, 1.0, alpha)
    elif ACT == "elu":
        d = tl.where(z > 0.0, 1.0, alpha * tl.exp(z))
    elif ACT == "sigmoid":
        s = tl.sigmoid(z)
        d = s * (1.0 - s)
    elif ACT == "tanh":
        t = tanh(z)
        d = 1.0 - t * t
    elif ACT == "silu":
        s = tl.sigmoid(z)
        d = s * (1.0 + z * (1.0 - s))
    elif ACT == "gelu":
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu-tanh":
        s = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
        d = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACT == "hardswish":
        d = tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 1.0, z * 0.3333333333333333 + 0.5))
    elif ACT == "mish":
        e = tl.exp(tl.where(z > 20.0, 20.0, z))
        t = e * (e + 2.0) / (e * (e + 2.0) + 2.0)
        d = t + z * (1.0 - t * t) * tl.sigmoid(z)
    elif ACT == "powlu-gate":
        safe = tl.where(z > 1e-30, z, 1e-30)
        root = tl.sqrt(safe)
        log = tl.log(safe)
        s = tl.sigmoid(z)
        power = tl.exp(alpha * log / (root + 1.0))
        growth = alpha * (1.0 / (safe * (root + 1.0)) - log / (2.0 * root * (root + 1.0) * (root + 1.0)))
        d = tl.where(z > 0.0, power * s * (growth + (1.0 - s)), s * (1.0 + z * (1.0 - s)))
    return d
