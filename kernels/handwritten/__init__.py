"""Triton kernels written by hand where they pay: what a graph of one input cannot say, and the commonest layers.

Normalisations with an activation and a residual, gated units, PolyNorm, and sign packing. Each family is a file of
eager functions and launchers and a file `*_triton` of kernels, imported on first use: without Triton or a GPU
everything runs eagerly. Statistics are float32; no atomics, so results repeat bit for bit on a device.

EvoNorm-B0 and S0 are not here: they are graphs of one input, and the schedules of the generator for them are the ones
below (whole groups in registers; sums, a merge, a pass that applies them), with the same bytes and launches.
"""

from kernels.handwritten.functions import (
    batch_norm_act,
    gated,
    group_norm_act,
    layer_norm_act,
    poly_norm,
    powlu_glu,
    rms_norm_act,
    swiglu,
)
from kernels.handwritten.sign_packing import sign_agreement, sign_words
