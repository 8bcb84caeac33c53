"""nas predict as its users meet it: results that are kept, statements, one line per error."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats
from cheap_predictor import Linear

from benchmarks import add_table, open_table
from nas.prediction.evaluator import PredictorEvaluator
from nas.run import Run
from predictors import registry
from predictors.evaluation import make_splits
from predictors.registry import load_predictor
from search_spaces.common.errors import UserError
from search_spaces.registry import load_space

SPACE = load_space("nas-bench-201")
ROWS = 120


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of 120 cells whose accuracy grows with their convolutions; one run and a test mean."""
    rng = np.random.default_rng(3)
    drawn = {}
    while len(drawn) < ROWS:
        arch = SPACE.sample(rng)
        drawn[SPACE.key(arch)] = arch
    archs = list(drawn.values())
    worth = np.array([sum({3: 5.0, 2: 3.0, 1: 1.0}.get(op, 0.0) for op in arch) for arch in archs]) + 50
    file = tmp_path_factory.mktemp("table") / "measured.parquet"
    columns = {"val_acc_9_seed0": worth + rng.normal(size=ROWS), "test_acc_9": worth + 0.3 * rng.normal(size=ROWS)}
    pyarrow.parquet.write_table(pyarrow.table({"arch": [SPACE.encode(a) for a in archs], **columns}), file)
    add_table("predicted/table", "nas-bench-201", file)
    return open_table("predicted/table")


def as_json(result) -> dict:
    status, out, err = result
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


EVALUATE = ("predict", "evaluate", "--benchmark", "predicted/table", "--predictors", "linear", "--out", "run")


def test_evaluate_reports_means_over_seeds(nas, table, tmp_path):
    arguments = (*EVALUATE, "--train-sizes", "20,50%", "--seeds", "3", "--report", "page.html")
    found = as_json(nas(*arguments, "--json"))
    assert (found["protocol"], found["labels"], found["target"], found["rows"]) == (
        "nasforge", "val-run", "test-mean", ROWS,
    )  # fmt: skip
    assert [(r["predictor"], r["train_size"]) for r in found["results"]] == [("linear", 20), ("linear", 60)]
    labels, targets = table.column("val_acc", seed=0), table.test_values(None, purpose="test")
    graphs = [SPACE.graph(table.arch(row)) for row in range(ROWS)]
    for result in found["results"]:
        taus = []
        for split in make_splits("nasforge", ROWS, [result["train_size"]], range(3)):
            predictor = registry.make_predictor("linear", "nas-bench-201", SPACE.vocabulary)
            rng = np.random.default_rng((split.seed, split.size))
            predictor.fit([graphs[row] for row in split.train], labels[split.train], rng=rng)
            taus.append(scipy.stats.kendalltau(predictor.predict(graphs), targets).statistic)
        assert result["kendall_tau"]["n"] == 3
        assert result["kendall_tau"]["mean"] == pytest.approx(np.mean(taus))
        assert result["kendall_tau"]["std"] == pytest.approx(np.std(taus, ddof=1))
    status, out, _ = nas(*arguments)
    assert status == 0
    assert "protocol nasforge, 3 seeds; labels val-run, target test-mean" in out
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "val-run" in page


class Interrupted(Linear):
    """Gives up after a number of fits, as a killed process does."""

    fits = 0
    patience = 10**6

    def __init__(self, space_name, vocabulary, settings=None):
        super().__init__(space_name, vocabulary)

    def fit(self, *args, **kwargs):
        if Interrupted.fits >= Interrupted.patience:
            raise KeyboardInterrupt
        Interrupted.fits += 1
        return super().fit(*args, **kwargs)


@pytest.fixture
def interrupted(monkeypatch):
    monkeypatch.setitem(registry.PREDICTORS, "interrupted", "ignored:ignored")
    make = registry.make_predictor

    def made(name, space, vocabulary, **settings):
        return Interrupted(space, vocabulary) if name == "interrupted" else make(name, space, vocabulary, **settings)

    monkeypatch.setattr("nas.prediction.evaluation.make_predictor", made)
    Interrupted.fits, Interrupted.patience = 0, 10**6
    return Interrupted


def test_an_interrupted_evaluation_goes_on_and_ends_alike(nas, table, interrupted):
    arguments = ("predict", "evaluate", "--benchmark", "predicted/table", "--predictors", "interrupted")
    arguments += ("--train-sizes", "20,40", "--seeds", "3", "--json")
    whole = as_json(nas(*arguments, "--out", "whole"))
    interrupted.fits, interrupted.patience = 0, 4
    assert nas(*arguments, "--out", "part")[0] == 130
    assert [t.status for t in Run.open("part").trials()] == ["done"] * 4
    interrupted.patience = 10**6
    again = as_json(nas(*arguments, "--out", "part"))
    assert interrupted.fits == 6
    for one, other in zip(whole["results"], again["results"], strict=True):
        assert one["kendall_tau"] == other["kendall_tau"]
    as_json(nas(*arguments, "--out", "part"))
    assert interrupted.fits == 6  # everything was there
    more = as_json(nas(*arguments[:-2], "4", "--json", "--out", "part"))  # another seed joins
    assert interrupted.fits == 8
    assert more["results"][0]["kendall_tau"]["n"] == 4


def test_a_folder_serves_one_task(nas, table):
    as_json(nas(*EVALUATE, "--train-sizes", "20", "--seeds", "2", "--json"))
    status, _, err = nas(*EVALUATE, "--train-sizes", "20", "--seeds", "2", "--labels", "test-mean")
    assert status == 2
    assert "labels was 'val-run', now 'test-mean'" in err
    more = (*EVALUATE[:4], "--predictors", "linear,gp-graf", *EVALUATE[-2:], "--train-sizes", "20", "--seeds", "2")
    as_json(nas(*more, "--setting", "gp-graf.kernel=rbf", "--json"))  # another predictor, with settings of its own
    status, _, err = nas(*more)
    assert status == 2
    assert "gp-graf.kernel was 'rbf', now 'matern-5/2'" in err


def test_what_a_predictor_refuses_does_not_end_the_others(nas, table, monkeypatch):
    def fit(self, graphs, y, **given):
        if len(y) == 20:
            raise UserError(20, "more labels than that")
        return Linear.fit(self, graphs, y, **given)

    monkeypatch.setitem(registry.PREDICTORS, "picky", "ignored:ignored")
    picky = type("Picky", (Linear,), {"fit": fit})
    monkeypatch.setattr("nas.prediction.evaluation.make_predictor", lambda name, space, words, **_: picky(space, words))
    found = as_json(
        nas(
            "predict", "evaluate", "--benchmark", "predicted/table", "--predictors", "picky", "--train-sizes", "20,30",
            "--seeds", "2", "--out", "picky", "--json",
        )
    )  # fmt: skip
    assert [r["train_size"] for r in found["results"]] == [30]
    assert found["failures"] == [
        {"predictor": "picky", "train_size": 20, "error": "20: expected more labels than that"}
    ]
    assert "picky on 20 labels failed" in found["warnings"][0]


WRONG = {
    "--predictors gp-graff": "did you mean 'gp-graf'",
    "--train-sizes 2": "a training size from 3 to 120",
    "--train-sizes 121": "a training size from 3 to 120",
    "--protocol pinta": "did you mean 'pinat'",
    "--protocol pinat --train-sizes 20": "'20': expected a size of the protocol pinat",
    "--labels val-runs": "did you mean 'val-run'",
    "--target val-run": "a kind of targets",
    "--seeds 0": "a number of seeds from 1",
    "--setting linear.nothing=1": "a setting of the predictor",
    "--setting nothing=1": "PREDICTOR.NAME=VALUE",
    "--train-sizes ,": "at least one training size",
    "--predictors ,": "at least one predictor",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_one_line(nas, table, wrong, tmp_path):
    status, out, err = nas(*EVALUATE, "--seeds", "1", "--train-sizes", "20", *wrong.split(" "))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert WRONG[wrong] in err.replace("20: expected a size", "'20': expected a size")
    assert not (tmp_path / "run").exists()


def test_train_and_rank(nas, table, tmp_path):
    arguments = ("predict", "train", "--benchmark", "predicted/table", "--predictor", "linear", "--out", "saved")
    found = as_json(nas(*arguments, "--train-size", "60", "--json"))
    assert (found["train_size"], found["labels"], found["target"]) == (60, "val-run", "test-mean")
    assert 0.5 < found["held_out_kendall_tau"] < 1
    status, _, err = nas(*arguments)
    assert status == 2
    assert "--force" in err

    ranking = as_json(nas("predict", "rank", "saved", "--space", "nas-bench-201", "--top", "7", "--json"))
    assert ranking["candidates"] == 6466  # the published number of classes
    predictor = load_predictor(tmp_path / "saved")
    one_of_each = {}
    for arch in SPACE:
        one_of_each.setdefault(SPACE.key(arch), arch)
    scores = predictor.predict([SPACE.graph(arch) for arch in one_of_each.values()])
    assert [r["rank"] for r in ranking["ranking"]] == list(range(1, 8))
    np.testing.assert_allclose([r["score"] for r in ranking["ranking"]], np.sort(scores)[::-1][:7])
    first = SPACE.decode(ranking["ranking"][0]["arch"])
    np.testing.assert_allclose(predictor.predict([SPACE.graph(first)])[0], scores.max())
    sampled = as_json(nas("predict", "rank", "saved", "--sample", "50", "--top", "3", "--json"))
    assert sampled["candidates"] <= 50

    for wrong, line in (
        ("nas-bench-101", "trained on nas-bench-201"),
        ("nas-bench-21", "did you mean 'nas-bench-201'"),
    ):
        status, _, err = nas("predict", "rank", "saved", "--space", wrong)
        assert status == 2
        assert line in err
    status, _, err = nas("predict", "rank", "nowhere")
    assert status == 2
    assert "a folder with a saved predictor" in err

    evaluator = PredictorEvaluator(str(tmp_path / "saved"))
    assert evaluator.space == "nas-bench-201"
    assert evaluator.evaluate(first, seed=0)["predicted_score"] == pytest.approx(scores.max())
    with pytest.raises(UserError, match="trained on nas-bench-201"):
        PredictorEvaluator(str(tmp_path / "saved"), "nas-bench-101")


def test_list_names_every_predictor(nas):
    found = as_json(nas("predict", "list", "--json"))
    assert [p["name"] for p in found["predictors"]] == list(registry.PREDICTORS)
    assert all(p["about"] for p in found["predictors"])
    assert as_json(nas("predict", "list", "gp-graf", "--json"))["predictors"][0]["settings"]["kernel"] == "matern-5/2"
    status, out, _ = nas("predict", "list", "carl")
    assert status == 0
    assert "interventions" in out
    assert nas("predict", "list", "gp-graff")[0] == 2


def test_the_budget_of_pre_training_reaches_those_that_have_one(nas, table):
    train = ("predict", "train", "--benchmark", "predicted/table", "--train-size", "20", "--pretrain-steps", "3")
    cheap = ("--setting", "width=8", "--setting", "epochs=2", "--setting", "layers=1", "--out", "ranker", "--json")
    as_json(nas(*train, "--predictor", "cap", *cheap))
    assert load_predictor("ranker").settings.pretrain_steps == 3
    status, _, err = nas(*train, "--predictor", "linear", "--out", "other")
    assert status == 2
    assert "--pretrain-steps" in err


def test_a_predictor_is_searched_and_guides_searches(nas, table, nas_bench_201, tmp_path):
    train = ("predict", "train", "--benchmark", "predicted/table", "--predictor", "linear", "--train-size", "40")
    as_json(nas(*train, "--out", "ranker", "--json"))
    search = ("search", "--strategy", "local-search", "--queries", "30", "--json")
    found = as_json(nas(*search, "--evaluator", "predictor:ranker", "--out", "predicted"))
    best = max(r.metrics["predicted_score"] for r in Run.open(tmp_path / "predicted").trials())
    assert found["best"]["metrics"]["predicted_score"] == best
    guided = ("search", "--benchmark", "nas-bench-201/cifar10", "--strategy", "predictor", "--predictor", "linear")
    guided += ("--setting", "acquisition=mean", "--setting", "initial=10", "--queries", "20", "--json")
    for extra in ((), ("--warm-from", "ranker")):
        as_json(nas(*guided, *extra, "--out", f"guided{len(extra)}"))
        run = Run.open(tmp_path / f"guided{len(extra)}")
        assert run.settings["strategy_settings"]["predictor"] == "linear"
        assert len(run.trials()) == 20
    status, _, err = nas(*search, "--evaluator", "predictor:ranker", "--objectives", "val_acc")
    assert status == 2
    assert "predicted_score" in err
