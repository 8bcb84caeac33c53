"""Spaces to and from NNI. What needs the package nni runs in an environment of its own (`make nni`), not in CI's."""

from __future__ import annotations

import itertools
import json
import pickle
import sys

import numpy as np
import pytest

from nas.interop.nni import from_nni, from_sample, to_nni, to_sample
from nas.objectives import Objective
from nas.strategies import make_strategy
from search_spaces import UserError, load_space

PLAIN = {"width": [8, 16, 32], "op": ["conv", "pool", "skip"], "rate": [0.1, 0.5, 1.0], "bias": [True, False]}
FLAT = ["nas-bench-201", "nats-size", "nas-bench-macro"]
WHY = "nni is installed by `make nni` only: its pins do not fit the main environment"


@pytest.fixture
def nni():
    """The module nni.mutable."""
    return pytest.importorskip("nni.mutable", reason=WHY)


@pytest.fixture
def torch_nni():
    """The module nni.nas.nn.pytorch."""
    return pytest.importorskip("nni.nas.nn.pytorch", reason=WHY)


def hub(name: str, **scale):
    return getattr(pytest.importorskip("nni.nas.hub.pytorch", reason=WHY), name)(**scale)


def parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


# -- without nni ---------------------------------------------------------------------------------------------------


def test_all_architectures_of_a_dict_of_lists():
    space = from_nni(PLAIN)
    expected = {tuple(sorted(zip(PLAIN, values))) for values in itertools.product(*PLAIN.values())}
    found = {tuple(sorted(to_sample(space, arch).items())) for arch in space}
    assert found == expected
    assert len(space) == len(expected) == 54


def test_notation_round_trip_and_order():
    space = from_nni(PLAIN)
    for arch in space:
        text = space.encode(arch)
        assert json.loads(text) == to_sample(space, arch)
        assert space.decode(text) == arch
        assert space.decode(json.dumps(dict(reversed(json.loads(text).items())))) == arch
    assert len({space.encode(arch) for arch in space}) == 54


@pytest.mark.parametrize(
    ("text", "named", "suggestion"),
    [
        ("width=8", "width=8", '{"bias": true, "op": "conv", "rate": 0.1, "width": 8}'),
        ('{"bias": true, "op": "conv", "rate": 0.1}', "width", None),
        ('{"bias": true, "op": "conv", "rate": 0.1, "widht": 8}', "widht", "width"),
        ('{"bias": true, "op": "convv", "rate": 0.1, "width": 8}', '"convv"', '"conv"'),
        ('{"bias": 1, "op": "conv", "rate": 0.1, "width": 8}', "1", None),
        ('{"bias": true, "op": "conv", "rate": 0.1, "width": 8, "width": 16}', "width", None),
        ("[8]", "[8]", '{"bias": true, "op": "conv", "rate": 0.1, "width": 8}'),
    ],
)
def test_nonsense_is_refused_by_name(text, named, suggestion):
    with pytest.raises(UserError) as error:
        from_nni(PLAIN).decode(text)
    assert error.value.value == named
    assert error.value.suggestion == suggestion


@pytest.mark.parametrize(
    "choices",
    [{"a": []}, {"a": [1, 1.0]}, {"a": [1, True]}, {"a": [(1, 2), [1, 2]]}, {"a": [object()]}, {"a": [float("nan")]}],
)
def test_values_that_cannot_be_told_apart_or_written(choices):
    with pytest.raises(UserError, match="'a'"):
        from_nni(choices)


def test_a_javascript_number_is_the_number():
    space = from_nni({"rate": [0.5, 1.0], "depth": [1, 2]})
    assert from_sample(space, {"rate": 1, "depth": 2.0}) == (1, 1)
    assert space.encode((1, 1)) == '{"depth": 2, "rate": 1.0}'


def test_mutation_changes_one_label_and_neighbours_are_all_of_these(rng):
    space = from_nni({**PLAIN, "fixed": ["only"]})
    arch = space.sample(rng)
    neighbours = set(space.neighbors(arch))
    assert neighbours == {other for other in space if sum(a != b for a, b in zip(arch, other)) == 1}
    assert {space.mutate(arch, rng) for _ in range(300)} == neighbours
    other = space.sample(rng)
    children = (space.crossover(arch, other, rng) for _ in range(50))
    assert all(c in (a, b) for child in children for c, a, b in zip(child, arch, other))


def test_graphs_equal_the_graphs_one_by_one(rng):
    space = from_nni(PLAIN)
    archs = [space.sample(rng) for _ in range(20)]
    for together, single in zip(space.graphs(archs), super(type(space), space).graphs(archs), strict=True):
        np.testing.assert_array_equal(together, single)
    assert space.graph(archs[0]).ops[1] in ("bias=true", "bias=false")
    assert set(space.vocabulary) >= {"op=conv", "rate=0.5", "width=32"}
    many = from_nni({f"label {i}": list(range(10)) for i in range(20)})
    ops, adjacency, _ = many.graphs([(9,) * 20])
    assert [many.vocabulary[i] for i in ops[0]] == list(many.graph((9,) * 20).ops)
    assert adjacency[0].sum() == 40
    with pytest.raises(UserError, match="counted"):
        len(many)


def test_pickle_keeps_everything(rng):
    space = from_nni(PLAIN, name="mine")
    copy = pickle.loads(pickle.dumps(space))
    arch = space.sample(rng)
    assert (copy.name, copy.encode(arch), copy.vocabulary) == ("mine", space.encode(arch), space.vocabulary)


@pytest.mark.parametrize("strategy", ["random-search", "regularized-evolution"])
def test_a_search_finds_the_best(strategy):
    space = from_nni({f"x{i}": [0, 1, 2, 3] for i in range(3)})
    found = make_strategy(strategy, space, [Objective("score", True)], np.random.default_rng(1))
    best = -np.inf
    for _ in range(64):
        trial = found.ask()
        score = -sum((value - 2) ** 2 for value in to_sample(space, trial.arch).values())
        found.tell(trial.id, {"score": score})
        best = max(best, score)
    assert best == 0  # all 64 are different, so the optimum is among them
    with pytest.raises(StopIteration):
        found.ask()


def test_evolution_beats_random_on_a_larger_space():
    space = from_nni({f"x{i}": list(range(6)) for i in range(8)})

    def search(name: str, seed: int) -> int:
        strategy = make_strategy(name, space, [Objective("score", True)], np.random.default_rng(seed))
        scores = []
        for _ in range(300):
            trial = strategy.ask()
            scores.append(sum(to_sample(space, trial.arch).values()))
            strategy.tell(trial.id, {"score": scores[-1]})
        return max(scores)

    evolved, drawn = ([search(name, s) for s in range(3)] for name in ("regularized-evolution", "random-search"))
    assert max(evolved) == 40  # 8 labels of at most 5
    assert min(evolved) > max(drawn)


@pytest.mark.parametrize("name", FLAT)
def test_flat_spaces_round_trip(name, rng):
    space = load_space(name)
    archs = [space.sample(rng) for _ in range(50)]
    samples = [to_sample(space, arch) for arch in archs]
    assert [from_sample(space, sample) for sample in samples] == archs
    label = next(iter(samples[0]))
    with pytest.raises(UserError, match="widht"):
        from_sample(space, {**samples[0], label: "widht"})
    with pytest.raises(UserError, match=label):
        from_sample(space, {k: v for k, v in samples[0].items() if k != label})


def test_what_the_samples_say():
    tss, sss, macro = map(load_space, FLAT)
    cell = tss.decode("|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|")
    assert to_sample(tss, cell) == {
        "edge_0_1": "nor_conv_3x3",
        "edge_0_2": "none",
        "edge_1_2": "skip_connect",
        "edge_0_3": "avg_pool_3x3",
        "edge_1_3": "nor_conv_1x1",
        "edge_2_3": "none",
    }
    assert list(to_sample(sss, sss.decode("8:16:24:32:64")).values()) == [8, 16, 24, 32, 64]
    assert list(to_sample(macro, macro.decode("02012100")).values())[:3] == ["identity", "mb_k5_e6", "identity"]
    with pytest.raises(UserError, match="flat space"):
        to_sample(load_space("darts"), load_space("darts").sample(np.random.default_rng(0)))


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "nni"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nni", None)
    for call in (lambda: to_nni(load_space("nas-bench-201")), lambda: from_nni(object())):
        with pytest.raises(UserError, match=r"pip install 'nasforge\[nni\]'"):
            call()


def test_build_without_a_model():
    with pytest.raises(UserError, match="no network"):
        from_nni(PLAIN).build((0, 0, 0, 0))


# -- nni.mutable ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLAT)
def test_nni_contains_what_we_export(nni, name, rng):
    space = load_space(name)
    exported = to_nni(space)
    sizes = [len(domain.values) for domain in exported.simplify().values()]
    assert np.prod(sizes) == len(space)
    for _ in range(50):
        arch = space.sample(rng)
        sample = to_sample(space, arch)
        assert exported.contains(sample)
        assert exported.freeze(sample) == sample
        drawn: dict = {}
        exported.random(drawn)
        assert to_sample(space, from_sample(space, drawn)) == drawn
    assert not exported.contains({**sample, next(iter(sample)): "nonsense"})


def test_subsets_are_those_of_nni(nni):
    mutables = {
        "two": nni.CategoricalMultiple(["p", "q", "r"], n_chosen=2, label="two"),
        "any": nni.CategoricalMultiple([3, 1, 2], label="any"),
    }
    space = from_nni(mutables)
    expected = [{"two": a, "any": b} for a in mutables["two"].grid() for b in mutables["any"].grid()]
    found = [to_sample(space, arch) for arch in space]
    assert sorted(map(repr, found)) == sorted(repr({k: e[k] for k in ("any", "two")}) for e in expected)
    assert all(nni.MutableDict(mutables).contains(sample) for sample in found)
    assert to_nni(space).contains(found[0])
    arch = from_sample(space, {"two": ["r", "p"], "any": [2, 3]})
    assert space.encode(arch) == '{"any": [3, 2], "two": ["p", "r"]}'
    with pytest.raises(UserError, match="'two'"):
        from_sample(space, {"two": ["p", "p"], "any": []})
    with pytest.raises(UserError, match="many"):
        from_nni({"many": nni.CategoricalMultiple(range(13), label="many")})


@pytest.mark.parametrize("quantize", [None, 0.25])
def test_numerical_is_refused_by_its_label(nni, quantize):
    mutable = nni.Numerical(0, 1, quantize=quantize, label="learning_rate")
    with pytest.raises(UserError, match="learning_rate"):
        from_nni({"a": nni.Categorical([1, 2], label="a"), "b": mutable})


def test_labels_must_be_ones_own_and_unambiguous(nni):
    with pytest.raises(UserError, match="global/"):
        from_nni({"a": nni.Categorical([1, 2])})
    with pytest.raises(UserError, match="one meaning"):
        from_nni({"a": nni.Categorical([1, 2], label="x"), "b": nni.Categorical([1, 3], label="x")})
    with pytest.raises(UserError, match="'x'"):
        from_nni({"a": nni.Categorical([1, 2], label="x"), "x": [1, 2]})
    shared = from_nni({"a": nni.Categorical([1, 2], label="x"), "b": nni.Categorical([1, 2], label="x")})
    assert len(shared) == 2


def test_weights_are_the_distribution_of_samples(nni, rng):
    space = from_nni({"a": nni.Categorical(["x", "y", "z"], weights=[0.7, 0.2, 0.1], label="a")})
    counts = np.bincount([space.sample(rng)[0] for _ in range(3000)], minlength=3)
    assert ((counts / 3000 - [0.7, 0.2, 0.1]) ** 2 / np.array([0.7, 0.2, 0.1])).sum() * 3000 < 13.8  # chi2, p = 1e-3


def test_constraints_are_kept(nni, rng):
    from nni.mutable.annotation import ExpressionConstraint

    x, y = nni.Categorical([1, 2, 3, 4], label="x"), nni.Categorical([1, 2, 3, 4], label="y")
    both = nni.MutableList([x, y, ExpressionConstraint(x + y == 5, label="sum")])
    space = from_nni(both)
    allowed = {(a, b) for a, b in itertools.product(range(4), repeat=2) if a + b + 2 == 5}
    assert set(space) == allowed
    arch = space.sample(rng)
    assert arch in allowed
    assert space.mutate(arch, rng) in allowed  # no single change is allowed: a random one
    assert space.crossover((0, 3), (3, 0), rng) in allowed
    assert list(space.neighbors(arch)) == []
    with pytest.raises(UserError, match="constraints sum"):
        space.decode('{"x": 1, "y": 1}')
    with pytest.raises(UserError, match="counted"):
        len(space)


# -- ModelSpace and hub: torch and lightning, seconds each -----------------------------------------------------------


def small_net():
    import nni
    import torch
    from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableConv2d, MutableLinear, Repeat

    class Net(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            width = nni.choice("width", [4, 8])
            self.stem = MutableConv2d(3, width, 3, padding=1)
            body = {"skip": torch.nn.Identity(), "conv": MutableConv2d(width, width, 3, padding=1)}
            self.body = LayerChoice(body, label="body")
            self.plain = LayerChoice([torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 3, padding=1)], label="plain")
            self.tail = Repeat(lambda _: MutableConv2d(width, width, 1), (1, 3), label="depth")
            self.head = MutableLinear(width, 10)

        def forward(self, x):
            return self.head(self.tail(self.body(self.stem(self.plain(x)))).mean((2, 3)))

    return Net()


@pytest.mark.slow
def test_model_space_every_network_has_the_size_we_compute(torch_nni):
    import torch

    space = from_nni(small_net(), name="net")
    assert len(space) == 2 * 2 * 2 * 3
    for arch in space:
        sample = to_sample(space, arch)
        w = sample["width"]
        expected = (3 * 9 + 1) * w + (w * 9 + 1) * w * (sample["body"] == "conv") + (w + 1) * w * sample["depth"]
        expected += (w + 1) * 10 + 3 * (3 * (9 if sample["plain"] else 1) + 1)
        network = space.build(arch)
        assert parameters(network) == expected
        assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.slow
def test_networks_share_no_weights_and_follow_the_seed(torch_nni):
    import torch

    space = from_nni(small_net())
    arch = space.decode('{"body": "conv", "depth": 3, "plain": 1, "width": 8}')
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(space.build(arch))
    first, again, other = states
    frozen = space._mutable.freeze(to_sample(space, arch)).state_dict()
    assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in frozen.items()}
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert not torch.equal(a, c)
    for unwanted in ({"num_classes": 100}, {"in_channels": 1}, {"channels": 8}, {"norm": torch.nn.BatchNorm2d}):
        with pytest.raises(UserError):
            space.build(arch, **unwanted)


@pytest.mark.slow
def test_hub_nas_bench_201_has_our_parameters(torch_nni, rng):
    """The three published counts (1.531546, 0.241306 and 0.073306 M) and random cells against our networks."""
    import torch

    theirs, ours = from_nni(hub("NasBench201"), name="hub"), load_space("nas-bench-201")
    names = {"nor_conv_1x1": "conv_1x1", "nor_conv_3x3": "conv_3x3"}

    def translated(arch):
        cell = {f"cell/{label[5:]}": names.get(op, op) for label, op in to_sample(ours, arch).items()}
        return from_sample(theirs, cell)

    for operation, count in ((3, 1_531_546), (2, 241_306), (1, 73_306), (0, 73_306)):
        assert parameters(theirs.build(translated((operation,) * 6))) == count
        assert ours.cost((operation,) * 6)["params"] == count
    for _ in range(4):
        arch = ours.sample(rng)
        network, mine = theirs.build(translated(arch)).eval(), ours.build(arch).eval()
        assert parameters(network) == parameters(mine) == ours.cost(arch)["params"]
        # Both order a cell's edges by target and source, so weights match one by one, and so must the outputs.
        their_state, my_state = network.state_dict(), mine.state_dict()
        assert [v.shape for v in their_state.values()] == [v.shape for v in my_state.values()]
        mine.load_state_dict(dict(zip(my_state, their_state.values(), strict=True)))
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(mine(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_search_in_the_hub_nas_bench_201(torch_nni):
    """Our evolution proposes, NNI builds: a network of the size nearest to 0.8 M that the space holds."""
    space, ours = from_nni(hub("NasBench201")), load_space("nas-bench-201")
    strategy = make_strategy("regularized-evolution", space, [Objective("off", False)], np.random.default_rng(0))
    off = []
    for _ in range(40):
        trial = strategy.ask()
        off.append(abs(parameters(space.build(trial.arch)) - 800_000))
        strategy.tell(trial.id, {"off": off[-1]})
    assert min(off) == min(abs(ours.cost(arch)["params"] - 800_000) for arch in ours)


@pytest.mark.slow
def test_hub_nas_bench_101_has_our_parameters(torch_nni, rng):
    from search_spaces.cells.nas_bench_101 import Cell

    theirs = from_nni(hub("NasBench101", stem_out_channels=16, num_modules_per_stack=1), name="hub")
    ours = load_space("nas-bench-101")
    assert theirs.constraints
    for _ in range(5):
        arch = theirs.sample(rng)
        sample = to_sample(theirs, arch)
        assert theirs.decode(theirs.encode(arch)) == arch
        assert theirs.allows(theirs.mutate(arch, rng))
        count = sample["cell/num_nodes"]
        matrix = np.zeros((count, count), int)
        for node in range(1, count):
            matrix[sample[f"cell/input{node}"], node] = 1
        ops = ("input", *(sample[f"cell/op{node}"] for node in range(1, count - 1)), "output")
        cell = Cell(tuple(map(tuple, matrix.tolist())), ops)
        network = theirs.build(arch)
        unused = 0  # NNI makes a projection of the input for every vertex, used or not
        for part in network.modules():
            if type(part).__name__ == "_NasBench101CellFixed":
                idle = [p for p, used in zip(part.projections, part.connection_matrix[0]) if not used]
                unused += sum(map(parameters, idle))
        assert parameters(network) - unused == parameters(ours.build(cell, channels=16, cells_per_stage=1))


@pytest.mark.slow
def test_hub_darts_has_our_parameters(torch_nni, rng):
    theirs = from_nni(hub("DARTS", width=8, num_cells=6, dataset="cifar"), name="hub")
    ours = load_space("darts")
    for _ in range(3):
        arch = ours.sample(rng)
        sample = {}
        for part in ("normal", "reduce"):
            for place, (op, source) in enumerate(getattr(arch, part)):
                node, which = place // 2 + 2, place % 2
                sample[f"{part}/op_{node}_{which}"] = op
                sample[f"{part}/input_{node}_{which}"] = [source]
        network = theirs.build(from_sample(theirs, sample))
        assert parameters(network) == parameters(ours.build(arch, channels=8, layers=6))
