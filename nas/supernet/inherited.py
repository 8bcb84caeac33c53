"""Built networks with the weights they share in a trained supernet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nas.references import find_architecture
from nas.run import Run, TrialRecord
from nas.supernet.evolution import RECALIBRATION, first_images, selected
from nas.supernet.mixed import Mixed
from nas.supernet.network import Supernet
from nas.supernet.trained import TrainedSupernet, named_trial, open_trained
from nas.training.loop import training_errors
from nas.training.recalibrate import recalibrate
from search_spaces.choice import selected_state_dict
from search_spaces.common.errors import UserError
from search_spaces.space import SearchSpace

SEARCHED = "supernet:"  # with which the evaluator of a search among the paths of a supernet begins
BESIDE = ".auxiliary."
POOLS = (nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True, eq=False)
class Inherited:
    """A built network in evaluation mode with shared weights. run, record: the trial that found the architecture."""

    model: nn.Module
    arch: str
    trained: TrainedSupernet
    run: Run
    record: TrialRecord


def inherit(run: Run, seed: int | None = None, arch: Any = None) -> nn.Module:
    """The built network of an architecture with the weights it shares in a run's supernet, in evaluation mode.

    seed: of the search, default that of the best trial; arch: default what that seed found. BatchNorm's statistics are
    those of the first 2,000 images of the weights, so its accuracy on the alphas' images is the trial's `val_acc`.
    Errors: UserError as `open_trained`, for a seed that found nothing, and as `with_shared_weights`.
    """
    record = None
    if seed is None or arch is None:
        record = _found(run, seed)
        seed = record.seed
    trained = open_trained(run, seed)
    return _recalibrated(trained, trained.space.decode(record.arch) if arch is None and record else arch)


def load_inherited(reference: str) -> Inherited:
    """What `RUN`, `RUN:best` or `RUN:<id>` names: of a search in a supernet, or of one by `supernet:RUN` evaluators.

    Errors: UserError as `inherit`, and for another kind of run.
    """
    found = find_architecture(reference)
    evaluator = str(found.run.settings.get("evaluator", ""))
    if found.run.settings.get("kind") == "search" and evaluator.startswith(SEARCHED):
        run, trial = named_trial(evaluator.removeprefix(SEARCHED))
        seed = None if trial is None else trial.seed
    else:
        run, seed = found.run, found.record.seed
    trained = open_trained(run, seed)
    model = _recalibrated(trained, trained.space.decode(found.record.arch))
    return Inherited(model, found.record.arch, trained, found.run, found.record)


def with_shared_weights(supernet: Supernet, space: SearchSpace, arch: Any, **network: Any) -> nn.Module:
    """`space.build(arch, **network)` with the supernet's weights and running statistics, on its device and of its type.

    Normalisations that have no weights in the supernet get weight 1 and bias 0. The supernet stays as it is.
    Errors: UserError for what a built network does not have, partial channels and normalised pooling, and for `network`
    of another size than the supernet.
    """
    with torch.random.fork_rng(devices=[]):
        model = space.build(arch, **network)
    selection = space.select(arch)
    with selected(supernet, selection):
        _check(supernet)
        shared = {name: value.clone() for name, value in selected_state_dict(supernet.network).items()}
    # Beside a mixture, as DARTS- has skip connections: a selected candidate runs without it.
    shared = {name: value for name, value in shared.items() if name in model.state_dict() or BESIDE not in name}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            shared.setdefault(f"{name}.weight", torch.ones(module.num_features))
            shared.setdefault(f"{name}.bias", torch.zeros(module.num_features))
    try:
        model.load_state_dict(shared)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(space.encode(arch), f"an architecture with the tensors of the supernet's ({reason})") from None
    like = next(supernet.parameters())
    return model.to(like.device, like.dtype).eval()


def _check(supernet: Supernet) -> None:
    for part in supernet.network.modules():
        if not isinstance(part, Mixed):
            continue
        if part.partial > 1:
            expected = "a supernet whose edges see all channels: weights for a part of them fit no built network"
            raise UserError(f"partial={part.partial}", f"{expected} (search with --set partial=1)")
        chosen = part.candidates[part.selected]
        if isinstance(chosen, nn.Sequential) and len(chosen) > 1 and isinstance(chosen[0], POOLS):
            expected = "pooling as built networks have it, without a normalisation behind it"
            raise UserError(part.label, f"{expected} (search with --set norm_after_pools=false)")


def _recalibrated(trained: TrainedSupernet, arch: Any) -> nn.Module:
    model = with_shared_weights(trained.supernet, trained.space, arch, **trained.network)
    with training_errors(RECALIBRATION[1], "images in a batch"):
        recalibrate(model, first_images(trained.data, trained.data.train, *RECALIBRATION))
    return model.eval()


def _found(run: Run, seed: int | None) -> TrialRecord:
    """The best trial, or that of a seed."""
    if seed is None:
        return find_architecture(f"{run.path}:best").record
    for trial in run.trials():
        if trial.seed == seed and trial.status == "done":
            return trial
    raise UserError(seed, f"a seed whose search in {run.path} found an architecture")
