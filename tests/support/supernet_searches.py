"""Searches in tiny supernets, as states at hand, and what leaves one unchanged by an interruption."""

from __future__ import annotations

import copy
import functools

import torch

from nas.supernet.building import make_supernet, search_data
from nas.supernet.recipe import Recipe
from nas.supernet.recipes import recipe, scaled
from nas.supernet.state import SearchState, load_state_dict, start, state_dict
from nas.supernet.steps import run_epoch
from nas.training.data import Dataset, load_data
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")


def tiny_search(name: str, images: int = 70, **changes) -> tuple[Recipe, SearchState]:
    """A recipe with 4 channels and batches of 16, two steps an epoch, and its state before the first step."""
    small = {"channels": 4, "batch_size": 16, "epochs": 2, "alpha_warmup_epochs": 0, "drop_last": True}
    found = scaled(recipe(name), "tiny", flip=False).replaced({**small, **changes})
    data = search_data(_digits(), found, images=images, seed=0)
    return found, start(make_supernet(SPACE, found, data, seed=0), data, found, seed=0)


@functools.cache
def _digits() -> Dataset:
    return load_data("digits", val_share=0.0)


def assert_same_state(first: object, second: object, where: str = "") -> None:
    """Equal, tensors bit for bit, times left out."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first.keys() - {"seconds"}:
            assert_same_state(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second)):
            assert_same_state(a, b, f"{where}[{index}]")
    else:
        assert first == second, where


def assert_resumes(name: str, epochs: int = 2, **changes) -> SearchState:
    """A search that is saved after each epoch and goes on in a new state ends as an undisturbed one; its end."""
    found, whole = tiny_search(name, epochs=epochs, **changes)
    _, broken = tiny_search(name, epochs=epochs, **changes)
    for _ in range(epochs):
        run_epoch(whole, found)
        run_epoch(broken, found)
        saved = copy.deepcopy(state_dict(broken))
        _, broken = tiny_search(name, epochs=epochs, **changes)
        load_state_dict(broken, saved)
    assert_same_state(state_dict(whole), state_dict(broken))
    return whole
