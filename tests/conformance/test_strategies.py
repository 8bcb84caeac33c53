"""One suite over every strategy: numbering, replay, duplicates, failures, exhaustion, trials in flight, settings."""

from __future__ import annotations

import numpy as np
import pytest
from cheap_predictor import Linear

from nas.objectives import parse_objectives
from nas.strategies import STRATEGIES, make_strategy, strategy_settings
from search_spaces.cells.nas_bench_201 import NasBench201
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph
from search_spaces.space import TupleSpace


class Tiny(TupleSpace):
    """Twelve architectures, every one its own class."""

    name = "tiny"
    vocabulary = ("input", "output", "a", "b", "c")
    sizes = (3, 2, 2)

    def encode(self, arch):
        return "".join(map(str, arch))

    def decode(self, text):
        return tuple(map(int, text))

    def graph(self, arch):
        return OpGraph(("input", *("abc"[i] for i in arch), "output"), np.eye(5, k=1, dtype=bool))


class TinyClasses(Tiny):
    """The same with the last two positions exchangeable: nine classes."""

    def key(self, arch):
        return self.encode((arch[0], *sorted(arch[1:])))


GUIDED = ("predictor", "bananas", "npenas", "brp-nas", "weak-nas")


def how_many_are_kept(rest):
    """[N, 2]; a score of what is left at every position that needs no network."""
    return np.array([[sum(map(sum, kept)), -len(kept[0])] for kept in rest], float)


# What is tested is the search, neither the predictor nor the proxies.
LARGE = {**{name: {"predictor": Linear} for name in GUIDED}, "te-nas": {"scores": how_many_are_kept}}
SMALL = {  # settings that suit a space of twelve
    "regularized-evolution": {"population": 4, "tournament": 2},
    "nsga-ii": {"population": 4},
    "successive-halving": {"fidelities": (1, 3, 9), "configurations": 5},
    "hyperband": {"fidelities": (1, 3, 9)},
    "robot": {"scores": np.array, "explore": 5},
    "te-nas": {"scores": how_many_are_kept},
    **{name: {"predictor": Linear, "initial": 4, "batch": 2} for name in GUIDED},
    "warm-start": {"scores": np.array, "count": 3, "settings": {"population": 4, "tournament": 2}},
}
OBJECTIVES = parse_objectives("val_acc,params")
LARGE_SPACE = NasBench201()


def make(name, space, seed=0, objectives=OBJECTIVES, **settings):
    settings = settings or (SMALL if len(space) < 100 else LARGE).get(name, {})
    return make_strategy(name, space, objectives, np.random.default_rng(seed), **settings)


def measure(trial):
    """Some metrics that depend on the architecture and the fidelity."""
    value = sum((i + 2) * (v * 7 % 5) for i, v in enumerate(trial.arch)) + 0.01 * (trial.fidelity or 200)
    return {"val_acc": float(value), "params": float(sum(trial.arch))}


def drive(strategy, trials, in_flight=1, failing=lambda trial: False, schedule=None):
    """Ask up to `trials` times, tell in an order drawn from `schedule`; the list of events, until StopIteration.

    Events are ("ask", trial or None) and ("tell", id, metrics). All that was asked is told.
    """
    schedule = schedule or np.random.default_rng(99)
    events, open_trials, finished = [], [], False
    while open_trials or not finished:
        while not finished and len(open_trials) < in_flight:
            try:
                trial = strategy.ask()
            except StopIteration:
                finished = True
                break
            events.append(("ask", trial))
            if trial is None:
                assert open_trials, "None with nothing in flight"
                break
            open_trials.append(trial)
            finished = len(strategy.trials) >= trials
        assert strategy.pending() == len(open_trials)
        if open_trials:
            trial = open_trials.pop(int(schedule.integers(len(open_trials))))
            metrics = None if failing(trial) else measure(trial)
            strategy.tell(trial.id, metrics)
            events.append(("tell", trial.id, metrics))
    return events


def asked(events):
    return [event[1] for event in events if event[0] == "ask" and event[1] is not None]


@pytest.fixture(params=list(STRATEGIES))
def name(request):
    return request.param


def test_numbering_and_parents(name):
    strategy = make(name, LARGE_SPACE)
    told = set()
    for event in drive(strategy, 150, in_flight=3):
        if event[0] == "tell":
            told.add(event[1])
        else:
            trial = event[1]
            assert trial.parent is None or trial.parent in told
    assert [trial.id for trial in strategy.trials] == list(range(150))
    assert set(strategy.metrics) == set(range(150)) == told


@pytest.mark.parametrize("in_flight", [1, 5])
def test_replay_of_the_same_events_asks_the_same(name, in_flight):
    events = drive(make(name, LARGE_SPACE, seed=3), 150, in_flight, failing=lambda t: t.id % 7 == 2)
    again = make(name, LARGE_SPACE, seed=3)
    for event in events:
        if event[0] == "ask":
            assert again.ask() == event[1]
        else:
            again.tell(*event[1:])
    if name != "grid":
        other = drive(make(name, LARGE_SPACE, seed=4), 150, in_flight)
        assert [t.arch for t in asked(other)] != [t.arch for t in asked(events)]


@pytest.mark.parametrize("in_flight", [1, 4])
def test_nothing_is_asked_twice_and_no_worker_waits(name, in_flight):
    events = drive(make(name, LARGE_SPACE, seed=1), 400, in_flight, failing=lambda t: t.id % 11 == 5)
    assert all(event[1] is not None for event in events if event[0] == "ask")
    questions = [(LARGE_SPACE.key(t.arch), t.fidelity) for t in asked(events)]
    assert len(set(questions)) == len(questions) == 400


@pytest.mark.parametrize("in_flight", [1, 6, 50])
@pytest.mark.parametrize("space", [Tiny(), TinyClasses()], ids=["tiny", "classes"])
@pytest.mark.parametrize("failing", ["none", "some", "all"])
def test_a_space_is_exhausted(name, space, in_flight, failing):
    fails = {"none": lambda t: False, "some": lambda t: t.id % 3 == 1, "all": lambda t: True}[failing]
    strategy = make(name, space, seed=in_flight)
    events = drive(strategy, 1000, in_flight, fails)
    assert {space.key(t.arch) for t in asked(events)} == {space.key(a) for a in space}
    questions = [(space.key(t.arch), t.fidelity) for t in asked(events)]
    assert len(set(questions)) == len(questions)
    for _ in range(2):
        with pytest.raises(StopIteration):
            strategy.ask()


def test_tells_that_are_refused(name):
    strategy = make(name, Tiny())
    with pytest.raises(UserError, match="0: expected the id of a trial that was asked"):
        strategy.tell(0, None)
    trial = strategy.ask()
    for id in (-1, 1, 7):
        with pytest.raises(UserError, match=f"{id}: expected the id of a trial that was asked"):
            strategy.tell(id, {"val_acc": 1.0, "params": 1.0})
    with pytest.raises(UserError, match="'params': expected a metric"):
        strategy.tell(trial.id, {"val_acc": 1.0})
    strategy.tell(trial.id, {"val_acc": 1.0, "params": 1.0})
    with pytest.raises(UserError, match="0: expected a trial that was not told before"):
        strategy.tell(trial.id, None)


def test_failed_trials_are_no_parents(name):
    strategy = make(name, LARGE_SPACE)
    drive(strategy, 200, in_flight=2, failing=lambda t: t.id % 2 == 0)
    parents = {t.parent for t in strategy.trials} - {None}
    assert all(strategy.metrics[parent] is not None for parent in parents)


@pytest.mark.parametrize("name", ["regularized-evolution", "local-search", "nsga-ii", "predictor", "npenas"])
def test_bounds_come_before_the_metric(name):
    """A bound that few architectures keep: guided strategies ask for them far more often than chance does."""
    strategy = make(name, LARGE_SPACE, objectives=parse_objectives("val_acc,params>=19"))
    drive(strategy, 200)
    kept = np.mean([sum(t.arch) >= 19 for t in strategy.trials[100:]])
    by_chance = np.mean([sum(a) >= 19 for a in LARGE_SPACE])
    assert by_chance < 0.05
    assert kept > 5 * by_chance
    assert sum(strategy.trials[max(range(200), key=strategy.score)].arch) >= 19


def test_defaults_are_reported_and_accepted(name):
    settings = {**strategy_settings(name), **LARGE.get(name, {})}
    strategy = make_strategy(name, LARGE_SPACE, OBJECTIVES, np.random.default_rng(0), **settings)
    assert strategy.name == name
    assert strategy.ask().id == 0


def test_unknown_settings_are_refused(name):
    with pytest.raises(UserError, match="'temperature': expected"):
        make(name, LARGE_SPACE, temperature=1)


BAD = [
    ("regularized-evolution", {"population": 0}, 0, "population"),
    ("regularized-evolution", {"population": 2.5}, 2.5, "population"),
    ("regularized-evolution", {"population": "ten"}, "ten", "population"),
    ("regularized-evolution", {"population": True}, True, "population"),
    ("regularized-evolution", {"tournament": 0}, 0, "tournament"),
    ("regularized-evolution", {"population": 5, "tournament": 6}, 6, "tournament"),
    ("nsga-ii", {"population": 1}, 1, "population"),
    ("nsga-ii", {"crossover": 1.5}, 1.5, "crossover"),
    ("nsga-ii", {"mutation": float("nan")}, None, "mutation"),
    ("local-search", {"query": "fulll"}, "fulll", "query"),
    ("successive-halving", {"eta": 1}, 1, "eta"),
    ("successive-halving", {"configurations": 0}, 0, "configurations"),
    ("successive-halving", {"fidelities": ()}, (), "fidelities"),
    ("successive-halving", {"fidelities": "12"}, "12", "fidelities"),
    ("successive-halving", {"fidelities": (200, 12)}, (200, 12), "fidelities"),
    ("hyperband", {"fidelities": (12, 12)}, (12, 12), "fidelities"),
    ("hyperband", {"fidelities": (0, 12)}, 0, "fidelities"),
    ("hyperband", {"fidelities": 12}, 12, "fidelities"),
    ("hyperband", {"eta": float("inf")}, float("inf"), "eta"),
    ("grid", {"shuffle": "maybe"}, "maybe", "shuffle"),
    ("predictor", {"predictor": "gp-graff"}, "gp-graff", "gp-graf"),
    ("bananas", {"initial": 0}, 0, "initial"),
    ("brp-nas", {"random_share": 1.5}, 1.5, "random_share"),
]


@pytest.mark.parametrize(("name", "settings", "value", "setting"), BAD)
def test_bad_settings_are_refused_by_name_and_value(name, settings, value, setting):
    with pytest.raises(UserError, match=setting) as caught:
        make_strategy(name, LARGE_SPACE, OBJECTIVES, np.random.default_rng(0), **settings)
    assert value is None or caught.value.value == value


def test_misspelt_names_get_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'regularized-evolution'"):
        make("regularised-evolution", LARGE_SPACE)
    with pytest.raises(UserError, match="did you mean 'population'"):
        make("nsga-ii", LARGE_SPACE, popluation=3)
    with pytest.raises(UserError, match="did you mean 'full'"):
        make("local-search", LARGE_SPACE, query="fulll")
