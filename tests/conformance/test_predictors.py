"""One suite over every predictor; one that is registered joins by itself, at small sizes by the names of QUICK."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from predictors.predictor import Predictor
from predictors.registry import PREDICTORS, load_predictor, make_predictor, predictor_class
from search_spaces.common.errors import UserError
from search_spaces.graph import OpGraph
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
QUICK = {  # settings, wherever a predictor has them, that make it small
    "epochs": 2, "pretrain_steps": 2, "pretrain_batch": 16, "width": 8, "layers": 1, "rounds": 10, "trees": 10,
    "device": "cpu",
}  # fmt: skip
SMALL = {"auto": {"members": ("gp-graf", "linear")}}  # and those of one predictor
BAD_LABELS = {
    "those at 2, 4 are not": {2: np.nan, 4: np.inf},
    "labels that differ": dict.fromkeys(range(24), 1.5),
}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Pre-trained weights of two steps are nobody's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NASFORGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def graphs(count: int, seed: int) -> list[OpGraph]:
    rng = np.random.default_rng(seed)
    return list(dict.fromkeys(SPACE.graph(SPACE.sample(rng)) for _ in range(count)))


def worth(found: list[OpGraph]) -> np.ndarray:
    return np.array([sum("conv" in op for op in g.ops) + 0.01 * k for k, g in enumerate(found)])


LABELLED, OTHERS = graphs(24, 0), graphs(30, 1)
LABELS = worth(LABELLED)


def make(name: str) -> Predictor:
    known = {field.name for field in dataclasses.fields(predictor_class(name).Settings)}
    quick = {key: value for key, value in QUICK.items() if key in known}
    return make_predictor(name, SPACE.name, SPACE.vocabulary, **{**quick, **SMALL.get(name, {})})


def fitted(name: str, seed: int = 0) -> Predictor:
    return make(name).fit(LABELLED, LABELS, unlabelled=OTHERS, rng=np.random.default_rng(seed))


@pytest.fixture(params=list(PREDICTORS), scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def predictor(name):
    return fitted(name)


def test_is_a_predictor_of_its_space(name, predictor):
    assert isinstance(predictor, Predictor)
    assert (predictor.space_name, predictor.vocabulary) == (SPACE.name, SPACE.vocabulary)
    mean, deviation = predictor.predict(OTHERS, return_std=True)
    assert mean.shape == deviation.shape == (len(OTHERS),)
    assert np.isfinite(mean).all()
    assert np.isnan(deviation).all() or (deviation >= 0).all()
    np.testing.assert_allclose(predictor.predict(OTHERS), mean, rtol=1e-5, atol=1e-6)


def test_predictions_belong_to_graphs_not_to_places(predictor):
    order = np.random.default_rng(3).permutation(len(OTHERS))
    shuffled = predictor.predict([OTHERS[k] for k in order])
    np.testing.assert_allclose(shuffled, predictor.predict(OTHERS)[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predictor.predict(OTHERS[:1]), predictor.predict(OTHERS)[:1], rtol=1e-4, atol=1e-5)


def test_the_same_generator_gives_the_same_predictor(name, predictor):
    np.testing.assert_allclose(fitted(name).predict(OTHERS), predictor.predict(OTHERS), rtol=1e-5, atol=1e-6)


def test_saved_and_loaded_it_predicts_the_same(name, predictor, tmp_path):
    predictor.save(tmp_path)
    header = json.loads((tmp_path / "predictor.json").read_text())
    assert (header["kind"], header["space"]) == (name, SPACE.name)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    loaded = load_predictor(tmp_path)
    np.testing.assert_allclose(loaded.predict(OTHERS), predictor.predict(OTHERS), rtol=1e-5, atol=1e-6)
    (tmp_path / "predictor.json").write_text(json.dumps({**header, "format": header["format"] + 1}))
    with pytest.raises(UserError, match="a newer nasforge wrote this one"):
        load_predictor(tmp_path)


@pytest.mark.parametrize("expected", BAD_LABELS)
def test_labels_that_teach_nothing_are_refused(name, expected):
    labels = LABELS.copy()
    for place, value in BAD_LABELS[expected].items():
        if place < len(labels):
            labels[place] = value
    with pytest.raises(UserError, match=expected):
        make(name).fit(LABELLED, labels, unlabelled=OTHERS, rng=np.random.default_rng(0))


def test_too_few_graphs_and_unknown_operations_are_refused(name, predictor):
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="2: expected at least 3 labelled graphs"):
        make(name).fit(LABELLED[:2], LABELS[:2], unlabelled=OTHERS, rng=rng)
    with pytest.raises(UserError, match="at least one graph"):
        predictor.predict([])
    strange = OpGraph(("input", "nor_conv_5x5", "output"), np.eye(3, k=1, dtype=bool))
    with pytest.raises(UserError, match="'nor_conv_5x5': expected an operation of the predictor's vocabulary"):
        predictor.predict([strange])
    with pytest.raises(UserError, match="a predictor that was fitted"):
        make(name).predict(OTHERS)


def test_repeated_graphs_count_once_with_the_mean_of_their_labels(name, caplog):
    twice = [*LABELLED, *LABELLED[:5]]
    apart = np.concatenate([LABELS, LABELS[:5]])
    apart[:5] -= 0.25
    apart[-5:] += 0.25
    rng = np.random.default_rng(0)
    found = make(name).fit(twice, apart, unlabelled=OTHERS, rng=rng).predict(OTHERS)
    assert "5 of 29 labelled graphs repeat others; their labels are averaged" in caplog.text
    np.testing.assert_allclose(found, fitted(name).predict(OTHERS), rtol=1e-5, atol=1e-6)


def test_graphs_beyond_the_limit_are_refused(name, predictor):
    large = OpGraph(("input", *["nor_conv_3x3"] * 63, "output"), np.eye(65, k=1, dtype=bool))
    with pytest.raises(UserError, match="65: expected graphs of at most 64 nodes"):
        predictor.predict([large])
    with pytest.raises(UserError, match="65: expected graphs of at most 64 nodes"):
        make(name).fit([*LABELLED, large], np.append(LABELS, 1.0), unlabelled=OTHERS, rng=np.random.default_rng(0))


def test_extra_columns_are_asked_for_again(name):
    columns = {"nwot": np.linspace(0, 1, len(LABELLED))}
    with_extra = make(name).fit(LABELLED, LABELS, extra=columns, unlabelled=OTHERS, rng=np.random.default_rng(0))
    with pytest.raises(UserError, match=r"the extra columns it was fitted with \(nwot\)"):
        with_extra.predict(OTHERS)
    found = with_extra.predict(OTHERS, extra={"nwot": np.zeros(len(OTHERS)), "unused": np.zeros(1)})
    assert np.isfinite(found).all()
    with pytest.raises(UserError, match=f"one value of 'nwot' for each of the {len(OTHERS)} graphs"):
        with_extra.predict(OTHERS, extra={"nwot": np.zeros(3)})
