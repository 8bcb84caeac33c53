"""Whether the candidates of a user's own Choices can stand for each other: found before a search, named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from search_spaces.choice import Choice, find_choices
from search_spaces.common.errors import UserError
from search_spaces.module_choices import NamedChoice


def check_candidates(network: nn.Module, shape: Sequence[int]) -> None:
    """Run every candidate of every Choice once, on what reaches it of two random images of `shape` [C, H, W].

    The network, in evaluation mode meanwhile, stays as it is. Errors: UserError for images that the network does not
    take, a Choice that it does not run, and a candidate that fails, changes its input (`inplace=True`), or whose
    output has not the shape of the first candidate's; label and candidate are named.
    """
    seen: set[str] = set()

    def compare(choice: Choice, inputs: tuple[Any, ...]) -> None:
        seen.add(choice.label)
        first = None
        for index, candidate in enumerate(choice.candidates):
            given = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
            before = [x._version for x in given if isinstance(x, torch.Tensor)]
            name = _name(choice, index)
            try:
                found = _shape(candidate(*given))
            except UserError:
                raise
            except Exception as error:  # whatever a user's code says
                sizes = ", ".join(_shape(x) for x in inputs)
                raise UserError(name, f"a candidate that takes inputs of {sizes} ({_line(error)})") from error
            if before != [x._version for x in given if isinstance(x, torch.Tensor)]:
                raise UserError(name, "a candidate that leaves its input to the others as it is (inplace=False)")
            first = first or found
            if found != first:
                raise UserError(f"{name} gives {found}", f"the shape that {_name(choice, 0)} gives, {first}")

    modes = [(part, part.training) for part in network.modules()]
    hooks = [
        part.register_forward_pre_hook(compare)  # type: ignore[arg-type]
        for part in network.modules()
        if isinstance(part, Choice)
    ]
    random = torch.Generator().manual_seed(0)
    try:
        network.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network(torch.randn(2, *shape, generator=random))
    except UserError:
        raise
    except Exception as error:
        sizes = "x".join(map(str, shape))
        raise UserError(f"images of {sizes}", f"images that the module takes ({_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()
        for part, training in modes:
            part.training = training
    for label in find_choices(network):
        if label not in seen:
            raise UserError(label, "the label of a Choice that the module's forward runs")


def _name(choice: Choice, index: int) -> str:
    own = choice.names[index] if isinstance(choice, NamedChoice) else type(choice.candidates[index]).__name__
    return f"{choice.label}={own} (candidate {index})"


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
