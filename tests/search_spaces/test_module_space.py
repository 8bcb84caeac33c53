"""A space from any module with Choices: text, keys, networks with the same weights, costs, errors."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from search_spaces.choice import Choice, find_choices, select, selected_state_dict
from search_spaces.common.errors import UserError
from search_spaces.layers.catalog import layer
from search_spaces.layers.evaluate import evaluate
from search_spaces.module_choices import NamedChoice, choice_of_acts, choice_of_layers, choice_of_norms
from search_spaces.module_cost import module_cost
from search_spaces.module_space import ModuleSpace
from search_spaces.registry import load_space, space_text


class Net(nn.Module):
    """Two blocks that share a label, a choice inside a candidate, a label without a choice."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10, channels: int = 4):
        super().__init__()
        kernels = {f"conv{k}x{k}": nn.Conv2d(in_channels, channels, k, padding=k // 2) for k in (3, 5)}
        self.stem = NamedChoice(kernels, "stem")
        self.only = Choice([nn.BatchNorm2d(channels)], "only")
        self.blocks = nn.ModuleList(self.block(channels) for _ in range(2))
        self.head = nn.Linear(channels, num_classes)

    def block(self, channels: int) -> nn.Module:
        inner = choice_of_acts(["relu", "gelu", "evonorm-s0"], channels, "act")
        deep = nn.Sequential(nn.Conv2d(channels, channels, 1), inner)
        return Choice([nn.Identity(), deep, nn.Conv2d(channels, channels, 1), nn.AvgPool2d(3, 1, 1)], "block")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.only(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


SPACE = load_space(f"{__name__}:Net")
ARCHS = list(SPACE)


def one_choice(candidates, label: str = "op") -> nn.Module:
    return nn.Sequential(Choice(candidates, label))


# -- architectures -------------------------------------------------------------------------------------------------


def test_architectures_are_written_with_the_names_of_candidates():
    assert SPACE.sizes == (2, 4, 3)  # labels in the order of the module; the one without a choice is left out
    assert SPACE.encode((1, 1, 2)) == "stem=conv5x5,block=Sequential,act=evonorm-s0"
    assert SPACE.encode((0, 3, 0)) == "stem=conv3x3,block=AvgPool2d,act=relu"
    assert len(ARCHS) == len(SPACE) == 24
    texts = [SPACE.encode(arch) for arch in ARCHS]
    assert len(set(texts)) == 24
    for arch, text in zip(ARCHS, texts, strict=True):
        assert SPACE.decode(text) == SPACE.decode(f" {text}\n") == arch
    assert SPACE.codes(ARCHS).tolist() == list(range(24))


def test_candidates_of_one_class_are_numbered():
    found = ModuleSpace(lambda: one_choice([nn.Conv2d(3, 3, 1), nn.Identity(), nn.Conv2d(3, 3, 3, padding=1)]))
    assert [found.encode((i,)) for i in range(3)] == ["op=0", "op=Identity", "op=2"]
    places = [Choice([nn.ReLU(), nn.GELU()], "act"), Choice([nn.ReLU(), nn.SiLU()], "act")]
    assert ModuleSpace(lambda: nn.Sequential(*copy.deepcopy(places))).vocabulary[2:] == ("act=ReLU", "act=1")


def test_nonsense_is_refused_with_the_nearest():
    text = SPACE.encode(ARCHS[-1])
    wrong = [text[:end] for end in range(len(text))] + [f"{text}{more}" for more in ("x", ",", "=", f",{text}")]
    wrong += ["stem=0,block=1,act=0", "block=Identity,stem=conv3x3,act=relu", "conv3x3,Identity,relu", "٣"]
    for each in wrong:
        with pytest.raises(UserError):
            pytest.fail(f"{each!r} was read as {SPACE.decode(each)}")
    with pytest.raises(UserError, match="conv3x3") as caught:
        SPACE.decode("stem=conv3x4,block=Identity,act=relu")
    assert caught.value.suggestion in ("conv3x3", "conv5x5")


def test_changes_are_valid_and_follow_the_generator():
    rng = np.random.default_rng(0)
    for arch in ARCHS:
        child = SPACE.mutate(arch, rng)
        assert child in ARCHS
        assert sum(a != b for a, b in zip(arch, child)) == 1
        assert SPACE.crossover(arch, child, rng) in (arch, child)
        assert len(set(SPACE.neighbors(arch))) == 1 + 3 + 2
    samples = [SPACE.sample(rng) for _ in range(600)]
    counts = [samples.count(arch) for arch in ARCHS]
    assert min(counts) > 5  # 25 each; below 6 once in 100,000 times
    assert SPACE.sample(np.random.default_rng(4)) == SPACE.sample(np.random.default_rng(4))


def test_choices_out_of_force_change_nothing():
    """Keys are equal exactly where the networks are: the inner activation counts in one of four blocks only."""
    keys = {arch: SPACE.key(arch) for arch in ARCHS}
    assert len(set(keys.values())) == 2 * (3 + 3)
    images, module = torch.randn(2, 3, 8, 8), SPACE.choices().eval()
    outputs = {}
    for arch in ARCHS:
        select(module, SPACE.select(arch))
        outputs[arch] = module(images)
    for a, b in itertools.combinations(ARCHS, 2):
        assert torch.equal(outputs[a], outputs[b]) == (keys[a] == keys[b])
        assert (SPACE.graph(a) == SPACE.graph(b)) == (keys[a] == keys[b])
    assert SPACE.graph((0, 1, 2)).ops == ("input", "stem=conv3x3", "block=Sequential", "act=evonorm-s0", "output")
    _, adjacency, mask = SPACE.graphs(ARCHS)
    assert mask.sum(1).tolist() == [len(SPACE.graph(arch)) for arch in ARCHS]
    assert all(adjacency[i].sum() == n - 1 for i, n in enumerate(mask.sum(1)))


def test_spaces_too_large_to_count():
    found = ModuleSpace(lambda: nn.Sequential(*(Choice([nn.ReLU(), nn.GELU()], f"a{i}") for i in range(80))))
    rng = np.random.default_rng(0)
    archs = [found.sample(rng) for _ in range(20)]
    assert len(set(archs)) == 20
    assert np.mean(archs) == pytest.approx(0.5, abs=0.06)
    codes = found.codes(archs)
    assert len(set(codes.tolist())) == 20
    assert codes.tolist() == found.codes([found.decode(found.encode(arch)) for arch in archs]).tolist()
    with pytest.raises(UserError, match="enumerated"):
        len(found)


# -- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_built_networks_are_the_selected_part_of_the_module(arch):
    images = torch.randn(2, 1, 6, 6)
    torch.manual_seed(5)
    module = SPACE.choices(in_channels=1, num_classes=7, channels=3)
    select(module, SPACE.select(arch))
    torch.manual_seed(5)
    built = SPACE.build(arch, in_channels=1, num_classes=7, channels=3)
    assert not find_choices(built)
    assert built(images).shape == (2, 7)
    torch.testing.assert_close(built(images), module(images), rtol=0, atol=0)
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    chosen = selected_state_dict(module)
    assert list(chosen) == list(built.state_dict())
    built.load_state_dict(chosen)
    torch.testing.assert_close(built.eval()(images), module.eval()(images), rtol=0, atol=0)


def test_the_factory_gets_the_keywords_that_it_takes():
    def plain():
        return one_choice([nn.ReLU(), nn.GELU()])

    def scaled(num_classes, **more):
        return nn.Sequential(*plain(), nn.Flatten(), nn.Linear(more.get("width", 5), num_classes))

    assert len(ModuleSpace(plain).build((0,), in_channels=1, num_classes=2)) == 1
    assert ModuleSpace(scaled).build((0,), width=6)[-1].weight.shape == (10, 6)
    with pytest.raises(UserError) as caught:
        SPACE.build(ARCHS[0], chanels=8)
    assert caught.value.suggestion == "channels"
    with pytest.raises(UserError, match="it has none"):
        ModuleSpace(plain).choices(width=6)

    def deeper(depth: int = 1):
        return nn.Sequential(*(Choice([nn.ReLU(), nn.GELU()], f"act{i}") for i in range(depth)))

    with pytest.raises(UserError, match="depth=2': expected keywords with which .* same Choices"):
        ModuleSpace(deeper).choices(depth=2)


def test_a_shared_choice_stays_one_module():
    def make():
        twice = Choice([nn.Linear(3, 3), nn.Identity()], "op")
        return nn.Sequential(twice, nn.ReLU(), twice)

    built = ModuleSpace(make).build((0,))
    assert built[0] is built[2]
    assert isinstance(ModuleSpace(lambda: Choice([nn.ReLU(), nn.GELU()], "op")).build((1,)), nn.GELU)


def test_spaces_do_not_move_the_random_numbers_of_torch():
    before = torch.random.get_rng_state()
    ModuleSpace(functools.partial(Net, channels=6)).cost((0, 1, 2), input_size=8)
    assert torch.equal(before, torch.random.get_rng_state())


# -- costs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("nas-bench-201", {"channels": 4, "cells_per_stage": 1}),
        ("nas-bench-101", {"channels": 6, "cells_per_stage": 1}),
        ("nas-bench-macro", {"channels": 2}),
        ("darts", {"channels": 4, "layers": 3}),
    ],
)
def test_counted_costs_are_those_of_closed_formulas(name, net, rng):
    space = load_space(name)
    for _ in range(4):
        arch = space.sample(rng)
        shape = {"in_channels": 2, "num_classes": 7, **net}
        expected = space.cost(arch, input_size=8, **shape)
        found = module_cost(space.build(arch, **shape), torch.zeros(1, 2, 8, 8))
        same = set(found) if name == "nas-bench-macro" else set(found) - {"paths"}  # others count those of one cell
        assert {key: found[key] for key in same} == {key: expected[key] for key in same}


def test_costs_written_out():
    arch = SPACE.decode("stem=conv3x3,block=Sequential,act=gelu")
    stem, block, head = (3 * 9 + 1) * 4, 4 * 4 + 4, 4 * 10 + 10
    expected = {"params": stem + 8 + 2 * block + head, "macs": 64 * (3 * 9 * 4 + 2 * 16) + 40}
    found = SPACE.cost(arch, input_size=8)
    assert found == {**expected, "live_macs": expected["macs"], "depth": 4, "paths": 4}
    up = nn.Sequential(nn.ConvTranspose2d(3, 5, 2, stride=2), nn.Flatten(), nn.Linear(5 * 64, 2))
    assert module_cost(up, torch.zeros(1, 3, 4, 4))["macs"] == 16 * 3 * 5 * 4 + 5 * 64 * 2
    grey = ModuleSpace(functools.partial(Net, in_channels=1))
    assert grey.cost(arch, input_size=8, in_channels=1)["params"] == expected["params"] - 2 * 9 * 4
    with pytest.raises(UserError, match=r"3x8x8.*images that the module takes"):
        ModuleSpace(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), *one_choice([nn.ReLU(), nn.GELU()]))).cost(
            (0,), input_size=8
        )


def test_counting_leaves_the_network_alone():
    network = SPACE.build(ARCHS[5]).train()
    network.blocks.eval()
    network.head.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    module_cost(network, torch.randn(1, 3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    assert not network.blocks.training
    assert [p.requires_grad for p in network.parameters()].count(False) == 2
    assert not any(part._forward_hooks for part in network.modules())


# -- names ---------------------------------------------------------------------------------------------------------


def test_a_space_is_found_again_by_its_text():
    text = f"{__name__}:Net"
    assert SPACE.name == space_text(SPACE) == text
    for again in (pickle.loads(pickle.dumps(SPACE)), load_space(space_text(SPACE)), ModuleSpace(Net)):
        assert (again.name, again.vocabulary, again.sizes) == (text, SPACE.vocabulary, SPACE.sizes)
    assert space_text(load_space(f"{__name__}:wide")) == f"{__name__}:wide"


wide = ModuleSpace(functools.partial(Net, channels=6))


@pytest.mark.parametrize(
    "text",
    [
        "nas-bench-201+norm=batch-norm,group-norm+act=relu,silu",
        "darts+norm=batch-norm+act=relu,gelu",
    ],
)
def test_spaces_with_layers_have_a_text(text):
    space = load_space(text)
    assert space_text(space) == text
    assert [len(space.norms), len(space.acts)] == [part.count(",") + 1 for part in text.split("+")[1:]]
    assert load_space("nas-bench-201+act=relu,SiLU").acts.keys() == {"relu", "silu"}


@pytest.mark.parametrize("text", ["nas-bench-201+", "nas-bench-201+norms=dyt", "nas-bench-201+norm=dyt+norm=dyt"])
def test_layers_that_cannot_be_read_are_named(text):
    with pytest.raises(UserError, match=r"\+norm=<names>"):
        load_space(text)


one_module = one_choice([nn.ReLU(), nn.GELU()])
number = 3


def not_a_module():
    return 3


def without_choice():
    return nn.Linear(2, 2)


def fails(in_channels, width):
    raise AssertionError


def one_candidate():
    return one_choice([nn.ReLU()])


def two_counts():
    return nn.Sequential(one_choice([nn.ReLU(), nn.GELU()]), one_choice([nn.ReLU()]))


def bad_label():
    return one_choice([nn.ReLU(), nn.GELU()], "a=b")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("one_module", "not one module"),
        ("number", "makes modules with Choices"),
        ("not_a_module", "called with no keyword it gave a int"),
        ("without_choice", "this one has none"),
        ("fails", r"called with in_channels=3 it failed \(TypeError: .*width"),
        ("one_candidate", "two candidates"),
        ("two_counts", "one number of candidates"),
        ("bad_label", "'a=b': expected a label"),
        ("nothing", "has no 'nothing'"),
    ],
)
def test_what_is_no_space_is_named(name, named):
    with pytest.raises(UserError, match=named):
        load_space(f"{__name__}:{name}")


# -- choices of layers ---------------------------------------------------------------------------------------------


def test_choices_of_layers_compute_what_their_names_say():
    x = torch.randn(3, 4, 5, 5)
    acts = choice_of_acts(["relu", "GELU", "evonorm_s0"], 4, "act")
    assert acts.names == ("relu", "gelu", "evonorm-s0")
    torch.testing.assert_close(acts.candidates[1](x), F.gelu(x))
    norms = choice_of_norms(["batch-norm", "instance-norm"], 4, "norm")
    torch.testing.assert_close(norms.candidates[0](x), F.batch_norm(x, None, None, training=True))
    layers = choice_of_layers(["batch-norm+relu", "evonorm-s0", "derf"], 4, "layer")
    torch.testing.assert_close(layers.candidates[0](x), F.batch_norm(x, None, None, training=True).relu())
    made = layers.candidates[1]
    torch.testing.assert_close(made(x), evaluate(layer("evonorm-s0"), x, dict(made.named_parameters())))
    own = choice_of_acts({"own": lambda channels: nn.PReLU(channels), "none": lambda channels: nn.Identity()}, 4, "act")
    assert own.names == ("own", "none")
    assert own.candidates[0].weight.shape == (4,)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: choice_of_acts(["rellu"], 4, "act"), "did you mean 'relu'"),
        (lambda: choice_of_acts(["batch-norm"], 4, "act"), "normalisation"),
        (lambda: choice_of_norms(["relu"], 4, "norm"), "activation"),
        (lambda: choice_of_layers(["evonorm-s9"], 4, "layer"), "did you mean 'evonorm-"),
        (lambda: choice_of_layers(["batch-norm+rellu"], 4, "layer"), "did you mean 'relu'"),
        (lambda: choice_of_acts([], 4, "act"), "at least one candidate"),
        (lambda: NamedChoice({"a b": nn.ReLU()}, "act"), "without blank"),
        (lambda: NamedChoice({"3": nn.ReLU()}, "act"), "not a number"),
    ],
)
def test_names_that_do_not_fit_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()
