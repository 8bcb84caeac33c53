"""The ensemble: stacking against scipy's optimizers, normal scores against scipy.stats, its parts put together."""

import numpy as np
import pytest
import scipy.optimize
from scipy import stats

from predictors.ensemble import Ensemble, EnsembleSettings, stacking_weights, to_normal_scores
from predictors.graphs import as_table
from predictors.registry import load_predictor
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph

VOCABULARY = ("input", "output", "a", "b", "c")
MEMBERS = ("gp-graf", "linear")


def random_graph(rng, nodes):
    ops = ("input", *(VOCABULARY[i] for i in rng.integers(2, len(VOCABULARY), nodes - 2)), "output")
    return OpGraph(ops, np.triu(rng.random((nodes, nodes)) < 0.5, 1) | np.eye(nodes, k=1, dtype=bool))


@pytest.fixture(scope="module")
def data():
    """36 labelled graphs and a pool of 50; the operations decide."""
    rng = np.random.default_rng(2)
    graphs = list(dict.fromkeys(random_graph(rng, int(n)) for n in rng.integers(6, 9, 100)))[:86]
    y = np.array([g.ops.count("a") - g.ops.count("b") for g in graphs]) + 0.1 * rng.normal(size=86)
    return graphs[:36], y[:36], graphs[36:], y[36:]


def make(**settings):
    return Ensemble("any", VOCABULARY, EnsembleSettings(**({"members": MEMBERS} | settings)))


@pytest.fixture(scope="module")
def ensemble(data):
    return make().fit(data[0], data[1], rng=np.random.default_rng(0))


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("shrink", [0.0, 5.0, 1e6])
@pytest.mark.parametrize("members", [2, 4])
def test_weights_are_the_penalised_least_squares_that_scipy_finds(members, shrink, rng):
    """Over weights of at least zero, then divided by their sum: the scale of a prediction has no meaning."""
    targets = rng.normal(size=60)
    predictions = np.stack([k / members * targets + rng.normal(size=60) for k in range(members)], 1)

    def loss(w):
        return ((predictions @ w - targets) ** 2).sum() + shrink * ((w - 1 / members) ** 2).sum()

    start = np.full(members, 1 / members)
    found = scipy.optimize.minimize(loss, start, bounds=[(0, None)] * members, method="L-BFGS-B", tol=1e-14)
    weights = stacking_weights(predictions, targets, shrink)
    np.testing.assert_allclose(weights, found.x / found.x.sum(), atol=1e-4)
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0
    if shrink == 1e6:
        assert weights == pytest.approx([1 / members] * members, abs=1e-3)
    if shrink == 0:
        assert np.argmax(weights) == members - 1


def test_a_member_that_errs_gets_nothing_and_none_gives_equal_weights(rng):
    targets = rng.normal(size=40)
    assert stacking_weights(np.stack([targets, -targets], 1), targets, 0.0) == pytest.approx([1, 0])
    assert stacking_weights(np.stack([-targets, -targets], 1), targets, 0.0) == pytest.approx([0.5, 0.5])


def test_the_better_member_weighs_more(data):
    """The number of paths is among the path features; averages over neighbourhoods hardly know it."""
    labelled, *_ = data
    ways = [np.linalg.inv(np.eye(len(g)) - g.adjacency)[0, -1] for g in labelled]  # I + A + A^2 + ..., its corner
    y = np.log(ways) + 1e-3 * np.arange(36)
    fitted = make(members=("gp-graf", "random-projection"), shrink=0.0).fit(labelled, y, rng=np.random.default_rng(3))
    assert fitted.weights["gp-graf"] > 0.7
    pulled = make(members=("gp-graf", "random-projection"), shrink=1e6).fit(labelled, y, rng=np.random.default_rng(3))
    assert pulled.weights["gp-graf"] == pytest.approx(0.5, abs=0.01)


def test_weights_come_from_folds_that_cover_the_labelled_graphs(data, monkeypatch):
    """Members predict each labelled graph once, without having seen it; against the labels' normal scores."""
    labelled, y, _, _ = data
    seen = []

    def equal(rows, targets, shrink):
        seen.append((rows, targets))
        return [0.5, 0.5]

    monkeypatch.setattr("predictors.ensemble.stacking_weights", equal)
    make(folds=4).fit(labelled, y, rng=np.random.default_rng(0))
    (rows, targets), *_ = seen
    assert rows.shape == (36, 2)
    np.testing.assert_allclose(np.sort(targets), np.sort(stats.norm.ppf((stats.rankdata(y) - 0.5) / 36)))
    assert stats.kendalltau(rows[:, 0], targets)[0] < 0.999  # a fit would be perfect
    assert stats.kendalltau(rows[:, 0], targets)[0] > 0.5
    seen.clear()
    make(many=30).fit(labelled, y, rng=np.random.default_rng(0))  # above `many`, one fifth is held out once
    assert seen[0][0].shape == (7, 2)


@pytest.mark.parametrize("settings", [{"weighting": "equal"}, {"folds": 10}])
def test_few_labels_or_choice_make_equal_weights(settings, data):
    fitted = make(**settings).fit(data[0], data[1], rng=np.random.default_rng(0))
    assert fitted.weights == {"gp-graf": 0.5, "linear": 0.5}


# -------------------------------------------------------------------------------------------------------- normal scores


def test_scores_of_the_reference_are_quantiles_of_mid_ranks(rng):
    for values in (rng.normal(size=50), rng.integers(0, 9, 80).astype(float)):  # without and with ties
        expected = stats.norm.ppf((stats.rankdata(values) - 0.5) / len(values))
        np.testing.assert_allclose(to_normal_scores(values, np.sort(values)), expected, atol=1e-12)


def test_scores_keep_every_order_also_beyond_the_ends(rng):
    reference = np.sort(rng.normal(size=40))
    values = np.sort(np.append(rng.uniform(-9, 9, 200), reference))
    scores = to_normal_scores(values, reference)
    assert (np.diff(scores) > 0).all()
    beyond = to_normal_scores(reference[-1] + np.array([0.0, 1.0, 2.0]), reference)
    np.testing.assert_allclose(np.diff(beyond), 1 / reference.std())


# ------------------------------------------------------------------------------------------------------ the whole of it


@pytest.mark.parametrize("unlabelled", [False, True])
def test_predictions_are_weighted_means_of_scores(data, unlabelled):
    """On the reference population (the unlabelled graphs where given) scores are quantiles of mid-ranks; standard
    deviations are those of the mixture of the members' normal distributions."""
    labelled, y, pool, _ = data
    given = pool if unlabelled else labelled
    fitted = make().fit(labelled, y, unlabelled=pool if unlabelled else None, rng=np.random.default_rng(0))
    mean, std = fitted.predict(given, return_std=True)
    first, second = np.zeros(len(given)), np.zeros(len(given))
    for name, member in fitted._members.items():
        values, own = member.predict(given, return_std=True)
        scores = stats.norm.ppf((stats.rankdata(values) - 0.5) / len(given))
        own = np.zeros(len(given)) if name == "linear" else own / values.std()
        first += fitted.weights[name] * scores
        second += fitted.weights[name] * (scores**2 + own**2)
    np.testing.assert_allclose(mean, first, atol=1e-6)
    np.testing.assert_allclose(std, np.sqrt(second - first**2), atol=1e-5)
    np.testing.assert_allclose(fitted.predict(given), mean, atol=1e-12)


def test_members_are_those_fitted_to_all_labels(data, ensemble):
    """A Gaussian process and ridge regression draw nothing, so they equal ones fitted apart."""
    from predictors.registry import make_predictor

    labelled, y, pool, _ = data
    for name, member in ensemble._members.items():
        alone = make_predictor(name, "any", VOCABULARY).fit(labelled, y, rng=np.random.default_rng(9))
        np.testing.assert_allclose(member.predict(pool), alone.predict(pool), atol=1e-9)


def test_many_problems_together_equal_each_alone(data):
    labelled, y, pool, truth = data
    extra = {"proxy": np.append(y, truth)}
    problems = [
        (labelled, y, None, None),
        (labelled[:28], y[:28], None, pool),
        (as_table(pool, VOCABULARY), truth, {"proxy": extra["proxy"][36:]}, None),
    ]
    together = make().fit_many(problems, [np.random.default_rng(k) for k in range(3)])
    for k, (graphs, labels, columns, unlabelled) in enumerate(problems):
        alone = make().fit(graphs, labels, extra=columns, unlabelled=unlabelled, rng=np.random.default_rng(k))
        assert together[k].weights == pytest.approx(alone.weights)
        asked = None if columns is None else {"proxy": extra["proxy"][:36]}
        expected = alone.predict(labelled, extra=asked, return_std=True)
        np.testing.assert_allclose(together[k].predict(labelled, extra=asked, return_std=True), expected, atol=1e-9)


def test_saved_and_loaded_it_is_the_same(data, tmp_path):
    labelled, y, pool, _ = data
    fitted = make(shrink=1.0).fit(labelled, y, unlabelled=pool, rng=np.random.default_rng(0))
    fitted.save(tmp_path)
    loaded = load_predictor(tmp_path)
    assert isinstance(loaded, Ensemble)
    assert loaded.weights == fitted.weights
    assert loaded.settings == fitted.settings
    np.testing.assert_array_equal(loaded.predict(pool, return_std=True), fitted.predict(pool, return_std=True))


def test_members_that_need_unlabelled_graphs_are_left_out_without(data):
    labelled, y, pool, _ = data
    fitted = make(members=("linear", "feature-distilled")).fit(labelled, y, rng=np.random.default_rng(0))
    assert fitted.weights == {"linear": 1.0}
    alone = fitted._members["linear"].predict(pool)
    assert stats.spearmanr(fitted.predict(pool), alone)[0] == pytest.approx(1)
    with pytest.raises(UserError, match="a member that needs no unlabelled graphs, or some of these"):
        make(members=("feature-distilled",)).fit(labelled, y, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": ()}, "at least one member"),
        ({"weighting": "stacking"}, "a weighting"),
        ({"folds": 1}, "at least 2 folds"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


def test_unknown_members_are_refused(data):
    with pytest.raises(UserError, match="did you mean 'gp-graf'"):
        make(members=("gp-grafs",)).fit(data[0], data[1], rng=np.random.default_rng(0))
