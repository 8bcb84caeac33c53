"""Layers as computation graphs: what there is to search inside a layer, and how it becomes a module."""
