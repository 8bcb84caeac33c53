"""The command line as its users meet it: exit status, one line per error, one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("nas_bench_201")
CELL = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"


def as_json(result) -> dict:
    status, out, _ = result
    assert status == 0
    assert out.count("\n") == 1
    found = json.loads(out)
    assert {"command", "version", "seed", "seconds", "warnings"} <= set(found)
    return found


def test_search_prints_and_resumes(nas, tmp_path):
    arguments = ("search", "--benchmark", "nas-bench-201/cifar10", "--queries", "60", "--seed", "1", "--out", "run")
    found = as_json(nas(*arguments, "--json"))
    assert {"best", "best_test", "optimum", "regret", "front", "hypervolume_regret", "queries", "run"} <= set(found)
    assert found["queries"] == 60
    assert found["optimum"] == pytest.approx(91.607, abs=1e-3)
    assert found["regret"] == pytest.approx(found["optimum"] - found["best"]["metrics"]["val_acc"])
    assert found["best_test"] is None
    status, out, _ = nas(*arguments)
    assert status == 0
    assert found["best"]["arch"] in out
    again = as_json(nas("resume", "run", "--json"))
    assert again["best"] == found["best"]
    assert (tmp_path / "run" / "settings.json").exists()


def test_search_makes_its_own_folder(nas, tmp_path):
    nas("search", "--benchmark", "nas-bench-201/cifar10", "--queries", "5")
    nas("search", "--benchmark", "nas-bench-201/cifar10", "--queries", "5", "--strategy", "random_search")
    assert len(list((tmp_path / "runs").iterdir())) == 2
    listed = as_json(nas("runs", "--json"))["runs"]
    assert [r["state"] for r in listed] == ["done", "done"]


def test_several_objectives(nas, tmp_path):
    found = as_json(
        nas(
            *("search", "--benchmark", "nas-bench-201/cifar10", "--strategy", "nsga-ii", "--queries", "100"),
            *("--objectives", "val_acc,latency_ms,params<=1e6", "--out", "run", "--json"),
        )
    )
    assert len(found["front"]) > 3
    assert found["hypervolume_regret"] > 0
    assert all(point["metrics"]["params"] <= 1e6 for point in found["front"])
    assert nas("report", "run")[0] == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_show_and_plot(nas, tmp_path):
    nas("search", "--benchmark", "nas-bench-201/cifar10", "--queries", "30", "--out", "run")
    found = as_json(nas("show", "run:best", "--build", "--json"))
    assert found["built_params"] == found["cost"]["params"]
    assert (tmp_path / found["drawing"]).read_text().lstrip().startswith("<svg")
    assert as_json(nas("show", "run:7", "--json"))["trial"] == 7
    for name in ("curve.svg", "curve.png"):
        assert nas("plot", "run", "--out", name)[0] == 0
        assert (tmp_path / name).stat().st_size > 1000


def test_compare(nas, tmp_path):
    found = as_json(
        nas(
            *("compare", "--benchmark", "nas-bench-201/cifar10", "--strategies", "random-search,local_search"),
            *("--queries", "30", "--seeds", "4", "--report", "c.html", "--plot", "c.svg", "--json"),
        )
    )
    assert set(found["strategies"]) == {"random-search", "local-search"}
    assert set(found["strategies"]["local-search"]["mean_best"]) == {"10", "20", "30"}
    assert "<svg" in (tmp_path / "c.html").read_text()
    assert (tmp_path / "c.svg").stat().st_size > 1000


def test_bench_commands(nas, tmp_path):
    ids = [b["id"] for b in as_json(nas("bench", "list", "--json"))["benchmarks"]]
    assert "nas-bench-201/cifar10" in ids
    found = as_json(nas("bench", "query", "nas-bench-201/cifar10", CELL, "--json"))
    assert found["arch"] == CELL
    assert 80 < found["metrics"]["val_acc"] < 92
    assert nas("bench", "info", "nas-bench-201/cifar10")[0] == 0
    rows = ["arch,val_acc"] + [
        f"{CELL.replace('skip_connect', op)},{value}" for op, value in (("none", 1), ("nor_conv_1x1", 2))
    ]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    added = as_json(nas("bench", "add", "my/cells", "--space", "nas-bench-201", "--table", "mine.csv", "--json"))
    assert added["rows"] == 2
    assert nas("bench", "remove", "my/cells")[0] == 0
    assert nas("bench", "query", "my/cells", CELL)[0] == 2


def test_lists_and_doctor(nas):
    assert len(as_json(nas("spaces", "--json"))["spaces"]) >= 7
    listed = as_json(nas("strategies", "--json"))["strategies"]
    assert {"name": "regularized-evolution"}.items() <= next(
        s for s in listed if s["name"] == "regularized-evolution"
    ).items()
    found = as_json(nas("doctor", "--json"))
    assert {"python", "packages", "tables", "device", "triton"} <= set(found)
    for command in ("spaces", "strategies", "doctor"):
        assert nas(command)[0] == 0


def test_version():
    done = subprocess.run([sys.executable, "-m", "nas", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("nasforge 0.")


BAD = {
    "unknown command": (["serach"], "did you mean 'search'"),
    "unknown option": (["search", "--benchmrk", "x"], "--benchmark"),
    "no benchmark": (["search"], "--benchmark"),
    "benchmark": (["search", "--benchmark", "nas-bench-202/cifar10"], "did you mean 'nas-bench-201/cifar10'"),
    "data set": (["search", "--benchmark", "nas-bench-201/cifar-100"], "did you mean 'nas-bench-201/cifar100'"),
    "strategy": (
        ["search", "--benchmark", "nas-bench-201/cifar10", "--strategy", "regularised-evolution"],
        "'regularized-evolution'",
    ),
    "objective": (
        ["search", "--benchmark", "nas-bench-201/cifar10", "--objectives", "val_accuracy:max"],
        "did you mean 'val_acc'",
    ),
    "direction": (["search", "--benchmark", "nas-bench-201/cifar10", "--objectives", "quality"], "quality:max"),
    "bound": (
        ["search", "--benchmark", "nas-bench-201/cifar10", "--objectives", "val_acc,params<=few"],
        "number after <=",
    ),
    "space": (
        ["search", "--space", "nasbench201", "--evaluator", "small_space:score", "--objectives", "val_acc"],
        "'nas-bench-201'",
    ),
    "queries": (["search", "--benchmark", "nas-bench-201/cifar10", "--queries", "-3"], "queries"),
    "no number": (["search", "--benchmark", "nas-bench-201/cifar10", "--queries", "many"], "many"),
    "setting": (
        ["search", "--benchmark", "nas-bench-201/cifar10", "--setting", "popluation=5"],
        "did you mean 'population'",
    ),
    "setting's form": (["search", "--benchmark", "nas-bench-201/cifar10", "--setting", "population"], "NAME=VALUE"),
    "test split": (["search", "--benchmark", "nas-bench-201/cifar10", "--objectives", "test_acc"], "test_acc"),
    "fidelities": (
        ["search", "--benchmark", "nas-bench-201/cifar10", "--strategy", "hyperband"],
        "several training lengths",
    ),
    "missing table": (["search", "--benchmark", "nas-bench-101/cifar10"], "nas bench add nas-bench-101/cifar10"),
    "architecture": (
        ["bench", "query", "nas-bench-201/cifar10", CELL.replace("skip_connect", "skip_conect")],
        "did you mean 'skip_connect'",
    ),
    "no run": (["resume", "nowhere"], "settings.json"),
    "no run to show": (["show", "nowhere:best"], "settings.json"),
    "seed policy": (["bench", "query", "nas-bench-201/cifar10", CELL, "--seed-policy", "median"], "median"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_helpful_line(nas, case):
    arguments, said = BAD[case]
    status, out, err = nas(*arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(nas):
    status, _, err = nas("search", "--benchmark", "nope/nope", "--debug")
    assert status == 2
    assert "Traceback" in err


def test_ctrl_c_leaves_a_run_to_resume(nas, monkeypatch):
    import nas.executors as executors

    real, calls = executors.SerialExecutor.wait, []

    def interrupted(self):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(self)

    arguments = ("search", "--benchmark", "nas-bench-201/cifar10", "--queries", "40", "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(executors.SerialExecutor, "wait", interrupted)
        status, _, err = nas(*arguments)
    assert status == 130
    assert "nas resume" in err
    assert as_json(nas("resume", "run", "--json"))["queries"] == 40


def test_settings_of_single_strategies_in_a_comparison(nas):
    """`--setting STRATEGY.NAME=VALUE` reaches that strategy alone; what is misspelt is named."""
    table = ("compare", "--benchmark", "nas-bench-201/cifar10", "--strategies", "random-search,regularized-evolution")
    plain, small = (
        json.loads(nas(*table, "--queries", "30", "--seeds", "2", "--json", *more)[1])["strategies"]
        for more in ((), ("--setting", "regularized-evolution.population=4"))
    )
    assert plain["random-search"] == small["random-search"]
    assert plain["regularized-evolution"]["mean_best"] != small["regularized-evolution"]["mean_best"]
    for setting, said in (
        ("population=4", "STRATEGY.NAME=VALUE"),
        ("evolution.population=4", "regularized-evolution"),
        ("regularized-evolution.populaton=4", "population"),
    ):
        status, _, error = nas(*table, "--setting", setting)
        assert status == 2
        assert said in error
