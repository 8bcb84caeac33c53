"""Differentiable search: supernets that relax every Choice of a space, and how their two levels are optimised."""
