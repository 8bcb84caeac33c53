"""Choice: one selected candidate, shared labels, weights by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from search_spaces.choice import Choice, find_choices, select, selected_state_dict
from search_spaces.common.errors import UserError


class Nested(nn.Module):
    """A choice inside a candidate of a choice, beside an ordinary layer."""

    def __init__(self):
        super().__init__()
        inner = Choice([nn.Linear(3, 3), nn.Identity()], "inner")
        self.outer = Choice([nn.Identity(), nn.Sequential(nn.Linear(3, 3), inner)], "outer")
        self.twin = Choice([nn.Tanh(), nn.ReLU()], "inner")
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.twin(self.outer(x)))


def test_runs_the_selected_candidate_and_labels_are_shared():
    model, x = Nested(), torch.randn(4, 3)
    torch.testing.assert_close(model(x), model.last(x.tanh()))
    select(model, {"outer": 1, "inner": 1})
    torch.testing.assert_close(model(x), model.last(model.outer.candidates[1][0](x).relu()))
    assert {label: len(c) for label, c in find_choices(model).items()} == {"inner": 2, "outer": 1}


def test_selected_weights_have_the_names_of_the_plain_model():
    model = Nested()
    select(model, {"outer": 1, "inner": 0})
    plain = nn.Module()
    plain.outer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    plain.twin, plain.last = nn.Tanh(), nn.Linear(3, 2)
    state = selected_state_dict(model)
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    x = torch.randn(4, 3)
    torch.testing.assert_close(plain.last(plain.twin(plain.outer(x))), model(x))


def test_bad_selections_are_refused():
    with pytest.raises(UserError, match="did you mean 'outer'"):
        select(Nested(), {"outter": 0})
    with pytest.raises(UserError, match="from 0 to 1"):
        select(Nested(), {"outer": 2})
    with pytest.raises(UserError, match="at least one"):
        Choice([], "empty")
    uneven = nn.ModuleList([Choice([nn.Identity()], "x"), Choice([nn.Identity(), nn.ReLU()], "x")])
    with pytest.raises(UserError, match="one number of candidates"):
        find_choices(uneven)
