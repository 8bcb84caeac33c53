"""Choice: a searchable place inside any module. It runs one candidate; relaxations live in `nas.supernet`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from search_spaces.common.errors import UserError, one_of
from search_spaces.common.names import nearest


class Choice(nn.Module):
    """Runs one selected candidate module, the first until told otherwise.

    candidates: modules with one input and output shape. label: places that share a label are selected together.
    """

    def __init__(self, candidates: Iterable[nn.Module], label: str):
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        if len(self.candidates) == 0:
            raise UserError(label, "a Choice with at least one candidate")
        self.label = label
        self.selected = 0

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.candidates[self.selected](*inputs)

    def extra_repr(self) -> str:
        return f"label={self.label!r}, selected={self.selected}"


def find_choices(module: nn.Module) -> dict[str, list[Choice]]:
    """All Choices of a module by label. Errors: UserError if one label has different numbers of candidates."""
    found: dict[str, list[Choice]] = {}
    for part in module.modules():
        if isinstance(part, Choice):
            found.setdefault(part.label, []).append(part)
    for label, choices in found.items():
        counts = {len(c.candidates) for c in choices}
        if len(counts) > 1:
            raise UserError(label, f"one number of candidates under one label, found {sorted(counts)}")
    return found


def select(module: nn.Module, selection: Mapping[str, int]) -> None:
    """Set every Choice named in `selection` ({label: candidate index})."""
    choices = find_choices(module)
    for label, index in selection.items():
        if label not in choices:
            raise UserError(label, f"a label of this module ({one_of(choices)})", nearest(label, choices))
        count = len(choices[label][0].candidates)
        if not 0 <= index < count:
            raise UserError(index, f"a candidate index from 0 to {count - 1} for {label!r}")
        for choice in choices[label]:
            choice.selected = int(index)


def selected_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the present selection, under the names that `space.build(arch)` gives them."""
    choices = {f"{name}." if name else "": part for name, part in module.named_modules() if isinstance(part, Choice)}
    state: dict[str, torch.Tensor] = {}
    for key, value in module.state_dict().items():
        plain, chosen = key, True
        for prefix in sorted(choices, key=len, reverse=True):  # inner choices first, so that outer positions hold
            found = re.match(re.escape(prefix) + r"candidates\.(\d+)\.", key)
            if found is None:
                chosen &= not key.startswith(prefix)  # what stands beside the candidates, such as an auxiliary skip
            else:
                chosen &= int(found[1]) == choices[prefix].selected
                plain = prefix + plain[found.end() :]
        if chosen:
            state[plain] = value
    return state
