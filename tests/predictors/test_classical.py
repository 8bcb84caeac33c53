"""Classical predictors against scikit-learn and numpy on rows made here; the life of every one of them."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern
from sklearn.preprocessing import StandardScaler

import predictors.classical
from predictors.graphs import as_table
from predictors.path_features import path_features
from predictors.registry import load_predictor, make_predictor
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph

VOCABULARY = ("input", "output", "none", "a", "b", "c")
SMALL: dict[str, dict] = {
    "gp-graf": {},
    "gbt-graf": {"trees": 40},
    "rf-graf": {"trees": 25},
    "xgb-plus": {"trees": 60},
    "linear": {},
    "gp-wl": {},
    "random-projection": {},
    "auto": {"members": ("gp-graf", "linear")},
}
KINDS = list(SMALL)


def random_graph(rng, nodes):
    ops = ("input", *(VOCABULARY[i] for i in rng.integers(2, len(VOCABULARY), nodes - 2)), "output")
    adjacency = np.triu(rng.random((nodes, nodes)) < 0.5, 1)
    return OpGraph(ops, adjacency | np.eye(nodes, k=1, dtype=bool))


def quality(graphs, rng):
    """What structure decides: the operations on the nodes and the edges, with a little noise."""
    worth = {"a": 2.0, "b": 1.0, "c": -0.5}
    sums = np.array([sum(worth.get(op, 0) for op in g.ops) + 0.2 * g.adjacency.sum() for g in graphs])
    return sums + 0.05 * rng.normal(size=len(graphs))


@pytest.fixture(scope="module")
def data():
    """40 labelled graphs and a pool of 60."""
    rng = np.random.default_rng(5)
    graphs = list(dict.fromkeys(random_graph(rng, int(n)) for n in rng.integers(5, 8, 120)))[:100]
    y = quality(graphs, rng)
    return graphs[:40], y[:40], graphs[40:], y[40:]


def make(kind, **settings):
    return make_predictor(kind, "any", VOCABULARY, **(SMALL[kind] | settings))


def fit(kind, graphs, y, seed=0, **given):
    extra = given.pop("extra", None)
    return make(kind, **given).fit(graphs, y, extra=extra, rng=np.random.default_rng(seed))


def rows_of(labelled, pool):
    """Path features, standardised by scikit-learn on the labelled ones; columns that never vary left out."""
    first, second = (path_features(as_table(graphs, VOCABULARY))[0].astype(float) for graphs in (labelled, pool))
    varying = np.ptp(first, axis=0) > 1e-6
    scaler = StandardScaler().fit(first[:, varying])
    return scaler.transform(first[:, varying]), scaler.transform(second[:, varying])


# ------------------------------------------------------------------------------------------- against other computations


def test_gp_graf_is_scikit_learns_process_on_path_features(data):
    labelled, y, pool, _ = data
    predictor = fit("gp-graf", labelled, y, target="z-score")
    process = predictor._process
    kernel = ConstantKernel(process.amplitude) * Matern(process.length, nu=2.5)
    theirs = GaussianProcessRegressor(kernel, alpha=process.noise + 1e-8 * process.amplitude, optimizer=None)
    rows, places = rows_of(labelled, pool)
    mean, std = theirs.fit(rows, stats.zscore(y)).predict(places, return_std=True)
    np.testing.assert_allclose(predictor.predict(pool, return_std=True), (mean, std), atol=1e-4)


def test_gbt_graf_is_scikit_learns_boosting_on_path_features(data):
    """With all rows and columns in every split nothing is random."""
    labelled, y, pool, _ = data
    predictor = fit("gbt-graf", labelled, y, row_share=1.0, column_share=1.0, trees=20, rate=0.1, depth=2)
    rows, places = rows_of(labelled, pool)
    targets = stats.norm.ppf((stats.rankdata(y) - 0.5) / len(y))
    theirs = GradientBoostingRegressor(n_estimators=20, learning_rate=0.1, max_depth=2).fit(rows, targets)
    assert stats.kendalltau(predictor.predict(pool), theirs.predict(places))[0] > 0.9
    np.testing.assert_allclose(predictor.predict(labelled), theirs.predict(rows), atol=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 20.0])
def test_linear_is_least_squares_with_a_penalty(data, penalty):
    """As lstsq of the rows with sqrt(penalty) times the identity below them; the intercept bears no penalty."""
    labelled, y, pool, _ = data
    predictor = fit("linear", labelled, y, penalties=(penalty,), target="z-score", features=("graf",))
    rows, places = rows_of(labelled, pool)
    longer = np.concatenate([rows, np.sqrt(penalty) * np.eye(rows.shape[1])])
    weights = np.linalg.lstsq(longer, np.append(stats.zscore(y), np.zeros(rows.shape[1])), rcond=None)[0]
    np.testing.assert_allclose(predictor.predict(pool), places @ weights, atol=1e-4)


def test_linear_chooses_its_penalty_by_leave_one_out(data):
    labelled, y, pool, _ = data
    penalties = (0.01, 1.0, 30.0, 1000.0)
    rows, _ = rows_of(labelled, pool)
    targets = stats.zscore(y)
    errors = []
    for penalty in penalties:
        left_out = []
        for i in range(len(y)):
            kept = np.arange(len(y)) != i
            x, t = rows[kept] - rows[kept].mean(0), targets[kept] - targets[kept].mean()
            weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ t)
            left_out.append(targets[i] - targets[kept].mean() - (rows[i] - rows[kept].mean(0)) @ weights)
        errors.append(np.mean(np.square(left_out)))
    best = penalties[int(np.argmin(errors))]
    chosen = fit("linear", labelled, y, penalties=penalties, target="z-score", features=("graf",))
    alone = fit("linear", labelled, y, penalties=(best,), target="z-score", features=("graf",))
    np.testing.assert_allclose(chosen.predict(pool), alone.predict(pool), atol=1e-6)


def test_the_deviation_of_a_forest_is_that_between_its_trees(data):
    labelled, y, pool, _ = data
    predictor = fit("rf-graf", labelled, y)
    _, places = rows_of(labelled, pool)
    each = np.array([tree.predict(places) for tree in predictor._model.estimators_])
    mean, std = predictor.predict(pool, return_std=True)
    np.testing.assert_allclose(mean, predictor.predict(pool), atol=1e-9)
    np.testing.assert_allclose(mean, each.mean(0), atol=0.05)
    assert np.corrcoef(std, each.std(0))[0, 1] > 0.98
    assert (std > 0).mean() > 0.9


def test_gp_wl_depends_on_the_angle_between_counts(data):
    """k = f(|u - v|) of unit vectors; the angles from refinement by one round with dictionaries."""
    labelled, y, pool, _ = data
    predictor = fit("gp-wl", labelled, y, rounds=0, target="z-score")

    def counts(graphs):
        rows = np.array([[g.ops.count(op) for op in VOCABULARY] for g in graphs], float)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    process = predictor._process
    squares = ((counts(pool)[:, None] - counts(labelled)) ** 2).sum(2)
    cross = process.amplitude * np.exp(-0.5 * squares / process.length**2)
    np.testing.assert_allclose(predictor.predict(pool), cross @ process.weights, atol=1e-5)


def test_deviations_of_gp_graf_cover_what_is_held_out(data):
    """On labels that are a smooth function of the structure, without noise: roughly 95 % within two deviations."""
    labelled, y, pool, truth = data
    predictor = fit("gp-graf", labelled, y, target="z-score")
    mean, std = predictor.predict(pool, return_std=True)
    inside = np.abs((truth - y.mean()) / y.std() - mean) < 2 * std + 2 * 0.05 / y.std()
    assert 0.8 < inside.mean() <= 1
    assert std.mean() < 0.7  # and narrower than knowing nothing, which is one


# ---------------------------------------------------------------------------------------------- the life of a predictor


@pytest.fixture(scope="module")
def columns(data):
    """Two proxies of all 100 graphs, one telling; each with a value that is missing."""
    _, y, _, truth = data
    rng = np.random.default_rng(8)
    telling = np.append(y, truth) ** 3 + rng.normal(size=100)
    extra = {"synflow": telling, "noise": rng.normal(size=100)}
    extra["synflow"][[3, 70]] = [np.nan, -np.inf]
    return extra


def part(columns, rows):
    return {name: values[rows] for name, values in columns.items()}


@pytest.fixture(scope="module", params=KINDS)
def fitted(request, data, columns):
    """A predictor with extra columns and with labelled graphs that repeat."""
    labelled, y, _, _ = data
    rows = np.append(np.arange(40), [0, 7])
    labels = np.append(y, y[[0, 7]] + [0.3, -0.1])
    again = [labelled[i] for i in rows]
    return request.param, fit(request.param, again, labels, extra=part(columns, rows))


def test_it_ranks_what_it_has_not_seen(fitted, data, columns):
    _, predictor = fitted
    assert stats.kendalltau(predictor.predict(data[2], extra=part(columns, slice(40, None))), data[3])[0] > 0.5


def test_saved_and_loaded_it_predicts_the_same(fitted, data, columns, tmp_path):
    kind, predictor = fitted
    extra = part(columns, slice(40, None))
    predictor.save(tmp_path)
    loaded = load_predictor(tmp_path)
    assert loaded.extra_names == ("synflow", "noise")
    expected = predictor.predict(data[2], extra=extra, return_std=True)
    np.testing.assert_array_equal(loaded.predict(data[2], extra=extra, return_std=True), expected)
    loaded.save(tmp_path / "again")
    for name in ("predictor.json", "predictor.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes(), kind


def test_order_and_company_of_the_pool_do_not_matter(fitted, data, columns, monkeypatch):
    """Nor which graphs share a chunk; missing values are filled alike wherever they stand."""
    _, predictor = fitted
    _, _, pool, _ = data
    extra = part(columns, slice(40, None))
    whole = np.array(predictor.predict(pool, extra=extra, return_std=True))
    order = np.random.default_rng(1).permutation(60)
    mixed = predictor.predict([pool[i] for i in order], extra=part(extra, order), return_std=True)
    np.testing.assert_allclose(mixed, whole[:, order], atol=1e-7)
    pieces = [
        predictor.predict(pool[start : start + 10], extra=part(extra, slice(start, start + 10)), return_std=True)
        for start in range(0, 60, 10)
    ]
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-7)
    monkeypatch.setattr(predictors.classical, "CHUNK", 13)
    np.testing.assert_allclose(predictor.predict(pool, extra=extra, return_std=True), whole, atol=1e-7)


def test_extra_columns_are_used_by_name(fitted, data, columns):
    _, predictor = fitted
    _, _, pool, _ = data
    extra = part(columns, slice(40, None))
    expected = predictor.predict(pool, extra=extra)
    turned = dict(reversed(extra.items())) | {"unknown": np.zeros(60)}
    np.testing.assert_array_equal(predictor.predict(pool, extra=turned), expected)
    assert not np.allclose(predictor.predict(pool, extra=extra | {"synflow": extra["synflow"][::-1]}), expected)
    with pytest.raises(UserError, match=r"the extra columns it was fitted with \(synflow, noise\)"):
        predictor.predict(pool, extra={"noise": extra["noise"]})
    with pytest.raises(UserError, match="one value of 'noise' for each of the 60 graphs"):
        predictor.predict(pool, extra=extra | {"noise": np.zeros(59)})


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_graphs_count_once_with_their_mean(kind, data):
    labelled, y, pool, _ = data
    repeated = [*labelled, labelled[3], labelled[3]]
    labels = np.append(y, [y[3] + 3, y[3] + 6])
    averaged = y.copy()
    averaged[3] += 3
    expected = fit(kind, labelled, averaged).predict(pool)
    np.testing.assert_allclose(fit(kind, repeated, labels).predict(pool), expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["gp-graf", "linear", "rf-graf", "gp-wl"])
def test_monotone_changes_of_the_labels_change_nothing(kind, data):
    """Normal scores know the order alone; z-scores know more."""
    labelled, y, pool, _ = data
    first, second = (fit(kind, labelled, labels).predict(pool) for labels in (y, np.exp(y / 2)))
    np.testing.assert_allclose(first, second, atol=1e-9)
    third, fourth = (fit(kind, labelled, labels, target="z-score").predict(pool) for labels in (y, np.exp(y / 2)))
    assert not np.allclose(third, fourth, atol=1e-3)


def test_three_labelled_graphs_are_enough(data):
    labelled, y, pool, _ = data
    for kind in KINDS:
        assert np.isfinite(fit(kind, labelled[:3], y[:3]).predict(pool)).all(), kind


def test_graphs_that_features_cannot_tell_apart_are_predicted_alike():
    """Three numberings of one graph with other labels: nothing varies, so nothing can be learned."""
    ops = [("input", *middle, "output") for middle in ("abc", "bca", "cab")]
    adjacency = np.zeros((5, 5), bool)
    adjacency[0, 1:4] = adjacency[1:4, 4] = True
    graphs = [OpGraph(names, adjacency) for names in ops]
    for kind in ("gp-graf", "gbt-graf", "rf-graf", "gp-wl"):
        found = fit(kind, graphs, np.array([1.0, 2.0, 4.0])).predict(graphs)
        assert found == pytest.approx(found[0]), kind


# ------------------------------------------------------------------------------------------------------ what is refused


def test_settings_that_do_not_exist_are_refused(data):
    labelled, y, _, _ = data
    with pytest.raises(UserError, match="did you mean 'trees'"):
        make("gbt-graf", tree=3)
    with pytest.raises(UserError, match="did you mean 'gp-graf'"):
        make_predictor("gp-graff", "any", VOCABULARY)
    for kind, settings, message in (
        ("gp-graf", {"kernel": "matern"}, "a kernel"),
        ("gp-graf", {"target": "ranks"}, "a scale of targets"),
        ("rf-graf", {"features": ("grav",)}, "a feature set"),
        ("gbt-graf", {"library": "catboost"}, "sklearn, xgboost or lightgbm"),
    ):
        with pytest.raises(UserError, match=message):
            fit(kind, labelled, y, **settings)


@pytest.mark.parametrize("broken", ["json", "fields", "arrays", "no arrays", "kind"])
def test_broken_files_are_named(broken, data, tmp_path):
    labelled, y, _, _ = data
    fit("linear", labelled, y).save(tmp_path)
    header, arrays = tmp_path / "predictor.json", tmp_path / "predictor.safetensors"
    written = json.loads(header.read_text())
    if broken == "json":
        header.write_text("{")
    elif broken == "fields":
        header.write_text(json.dumps({key: value for key, value in written.items() if key != "vocabulary"}))
    elif broken == "kind":
        header.write_text(json.dumps(written | {"kind": "linea"}))
    elif broken == "arrays":
        arrays.write_bytes(arrays.read_bytes()[:100])
    else:
        arrays.unlink()
    expected = "did you mean 'linear'" if broken == "kind" else "that saving a predictor writes"
    with pytest.raises(UserError, match=expected):
        load_predictor(tmp_path)
