"""Exports: an architecture or a trained network as a model that needs the toolkit no more."""
