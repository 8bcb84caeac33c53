"""Inherited weights: built and exported networks answer as the supernet does with their candidates selected."""

from __future__ import annotations

import ast
import copy
import json
import re
import runpy
import sys
import types

import pytest
import torch
from torch import nn

from nas.run import Run
from nas.supernet.building import make_supernet, network_scale, search_data
from nas.supernet.evolution import selected
from nas.supernet.inherited import inherit, load_inherited, with_shared_weights
from nas.supernet.recipes import recipe, scaled
from nas.supernet.search import SearchTask, open_supernet, search_run
from nas.supernet.trained import open_trained
from nas.training.batches import evaluation_batches
from nas.training.data import load_data
from nas.training.loop import evaluate
from nas.training.recalibrate import recalibrate
from search_spaces.common.errors import UserError
from search_spaces.layered import with_layers
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
GENOTYPE = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 0), ('sep_conv_5x5', 2), "
    "('skip_connect', 0), ('dil_conv_3x3', 1), ('sep_conv_3x3', 3), ('skip_connect', 4)], normal_concat=range(2, 6), "
    "reduce=[('skip_connect', 0), ('skip_connect', 1), ('{pool}', 1), ('sep_conv_3x3', 2), ('dil_conv_3x3', 0), "
    "('skip_connect', 2), ('sep_conv_5x5', 4), ('skip_connect', 1)], reduce_concat=range(2, 6))"
)


def tiny(name: str = "darts-v1", **changes):
    found = scaled(recipe(name), "tiny", flip=False)
    if found.evolution is not None:
        changes |= {"evolution_population": 2, "evolution_generations": 1, "evolution_crossover": 1}
        changes |= {"evolution_mutation": 1, "evolution_recalibration": (1, 20), "evolution_evaluation": (1, 20)}
    return found.replaced({"channels": 4, "batch_size": 32, "epochs": 1, "alpha_warmup_epochs": 0, **changes})


def small(space, found):
    """A supernet for a few digits whose statistics and alphas are not those of the start, and those digits."""
    data = search_data(load_data("digits", val_share=0.0), found, images=60, seed=0)
    supernet = make_supernet(space, found, data, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in supernet.network.named_buffers():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for tensor in supernet.network.parameters():
            if tensor.ndim == 1:  # normalisations begin with ones and zeros
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return supernet, data


def shapes(space, found, data) -> dict:
    return {"in_channels": data.shape[0], "num_classes": data.num_classes, **network_scale(space, found)}


def random_images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# -- built networks --------------------------------------------------------------------------------------------------


LAYERED = with_layers(SPACE, norms=("batch-norm", "group-norm"), acts=("relu", "silu"))
MACRO = load_space("nas-bench-macro")
DARTS = load_space("darts")
CASES = {
    "all operations": (SPACE, "(3, 1, 2, 0, 4, 1)", {}),
    "affine": (SPACE, "(2, 3, 3, 4, 1, 2)", {"affine": True}),
    "edge normalisation": (SPACE, "(3, 3, 1, 2, 4, 3)", {"edge_normalisation": True}),
    "batch norm": (LAYERED, "|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|none~0|nor_conv_3x3~1|avg_pool_3x3~2|"
                   " # norm=batch-norm act=silu", {}),
    "group norm": (LAYERED, "|nor_conv_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|none~0|nor_conv_3x3~1|avg_pool_3x3~2|"
                   " # norm=group-norm act=relu", {}),
    "macro": (MACRO, "(0, 1, 2, 2, 1, 0, 1, 2)", {}),
    "darts": (DARTS, GENOTYPE.format(pool="max_pool_3x3"), {"norm_after_pools": False}),
    "darts without pools": (DARTS, GENOTYPE.format(pool="dil_conv_3x3"), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_built_network_answers_as_the_supernet(case):
    space, text, changes = CASES[case]
    found = tiny(**changes)
    supernet, data = small(space, found)
    supernet.double()
    arch = ast.literal_eval(text) if text.startswith("(") else space.decode(text)
    before = copy.deepcopy(supernet.state_dict())
    state = torch.get_rng_state()
    model = with_shared_weights(supernet, space, arch, **shapes(space, found, data))
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training
    images = random_images()
    supernet.eval()
    with selected(supernet, space.select(arch)), torch.no_grad():
        expected = supernet(images)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)
        assert expected.std() > 1e-3
        model.train(), supernet.train()
        torch.testing.assert_close(model(images), supernet(images), rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())
    assert not supernet.fixed


def test_what_no_built_network_has_is_named():
    found = tiny("pc-darts", partial=2)
    supernet, data = small(SPACE, found)
    with pytest.raises(UserError, match="partial=1"):
        with_shared_weights(supernet, SPACE, (3,) * 6, **shapes(SPACE, found, data))
    found = tiny()
    supernet, data = small(DARTS, found)
    arch = DARTS.decode(GENOTYPE.format(pool="max_pool_3x3"))
    with pytest.raises(UserError, match="norm_after_pools=false") as error:
        with_shared_weights(supernet, DARTS, arch, **shapes(DARTS, found, data))
    assert "reduce_1_3" in str(error.value)
    supernet, data = small(SPACE, found)
    with pytest.raises(UserError, match="tensors of the supernet"):
        with_shared_weights(supernet, SPACE, (3,) * 6, **{**shapes(SPACE, found, data), "channels": 8})


# -- of a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SPOS with the seeds 0 and 5."""
    out = tmp_path_factory.mktemp("inherited") / "run"
    search_run(SearchTask(tiny("spos"), images=120), out, seeds=(0, 5))
    return out


def test_the_accuracy_is_that_of_the_trial(folder):
    run = Run.open(folder)
    for trial in run.trials():
        model = inherit(run, trial.seed)
        data = open_trained(run, trial.seed).data
        batches = evaluation_batches(data.val.images, data.val.labels, 500, normalize=data.normalize)
        assert evaluate(model, batches)["acc"] == trial.metrics["val_acc"]
    best = max(run.trials(), key=lambda trial: trial.metrics["val_acc"])
    pairs = zip(inherit(run).parameters(), inherit(run, best.seed).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_any_architecture_with_recalibrated_statistics_equals_the_supernet(folder):
    run, arch = Run.open(folder), (3, 1, 2, 3, 4, 1)
    model = inherit(run, 5, arch)
    _, state, data = open_supernet(run, 5)
    state.supernet.select(SPACE.select(arch))
    images = data.normalize(data.train.images)
    recalibrate(state.supernet, [images])  # all of them are one batch
    state.supernet.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), state.supernet(images), rtol=0, atol=1e-5)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(part.affine for part in norms)


def test_a_seed_that_found_nothing_is_named(folder, tmp_path):
    run = Run.open(folder)
    with pytest.raises(UserError, match="found an architecture"):
        inherit(run, 3)
    with pytest.raises(UserError, match="0, 5|0 or 5"):
        inherit(run, 3, (3,) * 6)
    Run.create(tmp_path / "training", {"kind": "training", "task": {"space": "nas-bench-201"}})
    with pytest.raises(UserError):
        load_inherited(f"{tmp_path}/training:best")


# -- exported --------------------------------------------------------------------------------------------------------


def test_an_exported_file_alone_answers_as_the_supernet(nas, folder, tmp_path):
    status, out, err = nas("export", f"{folder}:1", "--weights", "inherited", "--to", "model.py", "--json")
    assert status == 0, err
    exported = json.loads(out)
    assert exported["trained"] is True
    assert exported["files"] == ["model.py", "model.safetensors", "model.md"]
    images = random_images(4).float()
    imported = re.findall(r"^\s*(?:from|import) (\w+)", (tmp_path / "model.py").read_text(), re.MULTILINE)
    assert set(imported) <= {"__future__", "torch", "pathlib", "safetensors", "math", "functools", "collections"}
    network = runpy.run_path("model.py")["load_network"]().eval()
    run = Run.open(folder)
    trial = run.trial(1)
    trained = open_trained(run, trial.seed)
    supernet = trained.supernet
    supernet.select(SPACE.select(SPACE.decode(trial.arch)))
    recalibrate(supernet, [trained.data.normalize(trained.data.train.images)])
    with torch.no_grad():
        expected = supernet.eval()(images)
        torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-3
    card = (tmp_path / "model.md").read_text()
    assert "the spos supernet" in card
    assert f"{trial.metrics['val_acc']:.5g}" in card


def test_what_a_search_by_the_supernet_found_inherits_from_it(nas, folder):
    words = ("search", "--evaluator", f"supernet:{folder}:1", "--objectives", "val_acc", "--queries", 3)
    status, _, err = nas(*words, "--out", "evolved")
    assert status == 0, err
    found = load_inherited("evolved:best")
    assert found.trained.seed == 5
    expected = inherit(Run.open(folder), 5, SPACE.decode(found.arch))
    images = random_images(2).float()
    assert torch.equal(found.model(images), expected(images))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--weights", "inherite"), "inherited"),
        (("--weights", "inherited", "--size", 16), "settled the network"),
        (("--weights", "inherited", "--scale", "channels=8"), "settled the network"),
    ],
)
def test_bad_options_are_named(words, named, nas, folder):
    status, _, err = nas("export", f"{folder}:best", "--to", "model.py", *words)
    assert status == 2
    assert named in err


def test_weights_belong_to_searches_in_supernets(nas, monkeypatch):
    status, _, err = nas("export", "--space", "nas-bench-201", "--arch", SPACE.encode((3,) * 6), "--to", "model.py",
                         "--weights", "inherited")  # fmt: skip
    assert status == 2
    assert "--weights" in err
    own = types.SimpleNamespace(worth=lambda arch, fidelity, seed: {"val_acc": float(sum(arch))})
    monkeypatch.setitem(sys.modules, "own_evaluator", own)
    words = ("--evaluator", "own_evaluator:worth", "--space", "nas-bench-201", "--objectives", "val_acc")
    status, _, err = nas("search", *words, "--queries", 2, "--out", "plain")
    assert status == 0, err
    status, _, err = nas("export", "plain:best", "--to", "model.py", "--weights", "inherited")
    assert status == 2
    assert "search in a supernet" in err
