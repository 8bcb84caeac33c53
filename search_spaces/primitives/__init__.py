"""Normalisations and activations, by name. Only torch, numpy and the standard library here."""
