"""Fused Triton kernels for searched layers."""
