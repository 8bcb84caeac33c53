"""Scores of a population: FreeREA's, the majority vote, and the one that trains, each against another way to it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from nas.evaluators import Rejected
from nas.scoring import ScoringTask, score_architectures
from nas.scoring.aggregates import needed, skipped_layers, with_aggregates
from nas.scoring.evaluator import ProxyEvaluator
from nas.scoring.many import ScoreTable
from nas.scoring.trained import with_bn_only
from nas.training.batch_norm_only import RECIPE, train_batch_norm_only
from nas.training.loop import train
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = NasBench201()
SMALL = {"channels": 4, "cells_per_stage": 1}
TASK = ScoringTask("nas-bench-201", batch_size=16, network=SMALL)


def scores(**columns) -> ScoreTable:
    archs = tuple(
        SPACE.encode(SPACE.from_code((7 + 3777 * k) % 15_625)) for k in range(len(next(iter(columns.values()))))
    )
    values = np.stack([np.asarray(c, float) for c in columns.values()], 1)[:, :, None]
    return ScoreTable(archs, tuple(columns), (0,), values)


def test_skipped_layers_by_the_notation():
    """Of an edge from node i in the group of node j: j - i - 1, averaged over the skip connections."""
    rng = np.random.default_rng(0)
    for arch in [SPACE.sample(rng) for _ in range(60)]:
        spans = []
        for target, group in enumerate(SPACE.encode(arch).split("+"), 1):
            for edge in group.strip("|").split("|"):
                operation, source = edge.split("~")
                if operation == "skip_connect":
                    spans.append(target - int(source) - 1)
        assert skipped_layers(SPACE.graph(arch)) == pytest.approx(np.mean(spans) if spans else 0.0)


def test_freerea_divides_by_the_maxima():
    table = scores(logsynflow=[10, 20, 40, 5], nwot=[200, np.nan, 100, 50])
    found = with_aggregates(table, ["freerea"], SPACE).values[:, 0, 0]
    skipped = np.array([skipped_layers(SPACE.graph(SPACE.decode(text))) for text in table.archs])
    assert skipped.max() > 0
    expected = [10 / 40 + 200 / 200, -np.inf, 40 / 40 + 100 / 200, 5 / 40 + 50 / 200] + skipped / skipped.max()
    np.testing.assert_allclose(found, expected)
    assert needed(["freerea"]) == ["logsynflow", "nwot"]
    with pytest.raises(UserError, match="graphs"):
        with_aggregates(table, ["freerea"])
    with pytest.raises(UserError, match="skip connections"):
        with_aggregates(table, ["freerea"], load_space("nats-size"))


def test_majority_vote_by_counting_pairs(rng):
    parts = {name: rng.permutation(9).astype(float) for name in ("synflow", "jacov", "snip")}
    parts["snip"][2] = np.nan
    found = with_aggregates(scores(**parts), ["majority-vote"]).values[:, 0, 0]
    columns = [np.where(np.isnan(c), -1, c) for c in parts.values()]
    for i in range(9):
        wins = [sum(c[i] > c[j] for c in columns) >= 2 for j in range(9) if j != i]
        assert found[i] == pytest.approx(sum(wins) / 8)  # no ties between three permutations


def test_majority_vote_of_ties_counts_half():
    found = with_aggregates(scores(synflow=[1, 2], jacov=[2, 1], snip=[3, 3]), ["majority-vote"]).values[:, 0, 0]
    np.testing.assert_array_equal(found, [0.5, 0.5])


def network(arch=(3, 1, 3, 2, 1, 3)) -> nn.Module:
    return TASK.model(arch, 0)


def test_training_normalisation_alone_is_training_with_all_else_frozen():
    """The same as the common loop on a network whose other parameters are frozen by hand, which stay as they were."""
    recipe = dataclasses.replace(RECIPE, steps=6, warmup_steps=1, batch_size=16)
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = train_batch_norm_only(model, TASK.opened(), recipe, seed=3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())

    frozen, data = network(), dataclasses.replace(TASK.opened(), val=TASK.opened().train)
    scales = 0
    for module in frozen.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(isinstance(module, nn.BatchNorm2d))
            scales += parameter.numel() * isinstance(module, nn.BatchNorm2d)
    by_hand = train(frozen, data, recipe, seed=3)
    assert found.trained == scales > 0
    assert found.loss == pytest.approx(by_hand.late_loss, rel=1e-6)
    assert found.score == -found.loss
    moved = {name for name, p in frozen.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.endswith((".weight", ".bias")) and before[name].dim() == 1 for name in moved)


def test_a_model_without_normalisation_has_no_such_score():
    with pytest.raises(UserError, match="normalisation layers"):
        train_batch_norm_only(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), TASK.opened(), seed=0)


def test_bn_only_beside_other_scores_with_cache_and_evaluator(tmp_path, monkeypatch):
    monkeypatch.setattr("nas.scoring.trained.RECIPE", dataclasses.replace(RECIPE, steps=4))
    archs = [(3, 1, 3, 2, 1, 3), (1, 1, 1, 1, 1, 1)]
    table = score_architectures(TASK, archs, ["params"], seeds=(0, 1))
    cache = tmp_path / "scores.sqlite"
    found = with_bn_only(table, TASK, cache=cache)
    expected = train_batch_norm_only(
        network(), TASK.opened(), dataclasses.replace(RECIPE, steps=4, batch_size=16), seed=0
    )
    assert found.proxies == ("params", "bn-only")
    assert found.column("bn-only")[0, 0] == pytest.approx(expected.score, rel=1e-6)
    assert len(np.unique(found.column("bn-only"))) == 4
    monkeypatch.setattr("nas.scoring.trained.train_batch_norm_only", None)  # all is in the cache
    np.testing.assert_array_equal(with_bn_only(table, TASK, cache=cache).values, found.values)


def test_bn_only_as_an_evaluator(monkeypatch):
    monkeypatch.setattr("nas.scoring.trained.RECIPE", dataclasses.replace(RECIPE, steps=3))
    evaluator = ProxyEvaluator("nas-bench-201", ("bn-only", "params"), batch_size=16, network=SMALL, cache=False)
    metrics = evaluator.evaluate((3, 1, 3, 2, 1, 3), seed=9)
    assert list(metrics) == ["bn_only", "params"]
    assert -5 < metrics["bn_only"] < 0
    assert metrics["params"] == sum(p.numel() for p in network().parameters())
    monkeypatch.setattr(
        "nas.scoring.trained.train_batch_norm_only",
        lambda *a, **k: (_ for _ in ()).throw(UserError("X", "a model with normalisation layers")),
    )
    with pytest.raises(Rejected, match="bn-only: the model has no normalisation"):
        evaluator.evaluate((3, 1, 3, 2, 1, 3), seed=9)


def test_commands_with_bn_only(nas, monkeypatch):
    monkeypatch.setattr("nas.scoring.trained.RECIPE", dataclasses.replace(RECIPE, steps=3))
    arch = SPACE.encode((3, 1, 3, 2, 1, 3))
    status, out, error = nas(
        "proxies", "score", "--space", "nas-bench-201", "--arch", arch, "--proxies", "bn-only", "--batch-size", 16,
        "--scale", "channels=4", "--scale", "cells_per_stage=1", "--seeds", 2, "--no-cache", "--json",
    )  # fmt: skip
    assert status == 0, error
    found = json.loads(out)
    assert list(found["scores"]) == list(found["spread"]) == ["bn-only"]
    assert found["spread"]["bn-only"] > 0
    status, _, error = nas("proxies", "score", "--model", "own_proxies:network", "--proxies", "bn-only")
    assert status == 2
    assert "nas train" in error
