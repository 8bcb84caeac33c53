"""nas kernels, and what its checks do when something is broken."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kernels import cache, check
from nas.cli import app as application
from nas.cli import fused as commands
from search_spaces.common.errors import RunError
from search_spaces.layers.space import LayerSpace


@pytest.fixture
def call(nas):
    """`nas` with the commands under `kernels`."""
    if "kernels" not in {group.name for group in application.app.registered_groups}:
        application.app.add_typer(commands.app, name="kernels")
    return lambda *arguments: nas("kernels", *arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "kernels"


# -- check -------------------------------------------------------------------------------------------------------


def test_check_fits_one_screen_and_names_what_needs_a_gpu(call, monkeypatch, folder):
    monkeypatch.setattr(check, "_compiled", lambda: "compiled")  # half a minute; its own test is below
    monkeypatch.setattr(check, "GRAPHS", 10)
    status, out, err = call("check")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) <= 24
    assert "interpreter" in out
    if not check.torch.cuda.is_available():
        assert "no GPU is here" in out
        assert "speed_kernels_gpu" in out
    assert "FAILED" not in out


def test_check_reports_what_is_broken(call, monkeypatch, folder):
    def broken(*_):
        raise RunError("no kernels today")

    monkeypatch.setattr(check, "layers_agree", broken)
    monkeypatch.setattr(check, "_in_a_process", broken)
    monkeypatch.setattr(check, "fallbacks", lambda *_, **__: {"this operation": 3})
    monkeypatch.setattr(check, "HAVE_TRITON", False)
    monkeypatch.setattr(check, "compiler", lambda: None)
    status, out, err = call("check", "--json")
    found = {c["name"]: c for c in json.loads(out)["checks"]}
    assert status == 1
    assert "operators by torch" in err
    assert found["operators by torch"]["state"] == "failed"
    assert "no kernels today" in found["operators by torch"]["detail"]
    assert found["random graphs"]["state"] == "failed"
    assert "3 of" in found["random graphs"]["detail"]
    for name in ("triton", "C compiler", "kernels compiled for sm_90"):
        assert found[name]["state"] == "missing"


def test_kernels_that_move_too_much_are_noticed(monkeypatch, importable):
    importable("triton")
    assert "of the fewest" in check._moved()
    monkeypatch.setattr(check, "MOVING", ("layer-norm",))  # larger than any tile: read twice
    with pytest.raises(RunError, match="layer-norm backward moves 1.67"):
        check._moved()


def test_layers_that_are_off_are_noticed(monkeypatch):
    assert "within" in check.layers_agree("cpu", "reference")
    from kernels import reference

    monkeypatch.setitem(reference.ELEMENTWISE, "sigmoid", lambda a: 1.00003 * a.sigmoid())
    with pytest.raises(RunError, match="differs from float64"):
        check.layers_agree("cpu", "reference")


def test_layers_that_no_kernel_runs_are_noticed():
    if check.by_kernels(check.torch.zeros(2)):
        pytest.skip("kernels run on the CPU of this process")
    with pytest.raises(RunError, match="do not run on cpu"):
        check.layers_agree("cpu", "auto")


def test_fallbacks_are_graphs_with_statistics_at_each_position_and_over_positions():
    assert check.fallbacks(30) == {}
    space, rng, mixed = LayerSpace("extended"), np.random.default_rng(0), 0
    for _ in range(60):
        axes = {node.axes for _, node in space.sample(rng).live_nodes}
        mixed += bool(axes & {"channel", "channel-group"} and axes & {"instance", "group", "layer"})
    assert sum(check.fallbacks(60, preset="extended").values()) == mixed > 0


def test_spilling_and_narrow_kernels_fail(monkeypatch, importable):
    importable("triton")

    def reports(**changes):
        fields = dict.fromkeys(check.aot.KernelReport.__dataclass_fields__, 0)
        about = {"layer": "silu", "over": "x", "registers": 40, "loads": {128: 1}, "stores": {128: 1}, **changes}
        monkeypatch.setattr(check.aot, "compile_jobs", lambda jobs, **_: [check.aot.KernelReport(**fields | about)])

    reports()
    assert "at most 40 registers" in check._compiled()
    reports(spills=2)
    with pytest.raises(RunError, match="spill"):
        check._compiled()
    reports(loads={16: 8})
    with pytest.raises(RunError, match="128 bits"):
        check._compiled()


# -- compile -----------------------------------------------------------------------------------------------------


def test_compile_reports_kernels_and_keeps_them(call, importable, tmp_path, folder):
    importable("triton")
    status, out, err = call("compile", "silu", "--shape", "4x16x8x8", "--to", "kept", "--out", "table.md", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert {k["direction"] for k in found["kernels"]} == {"forward", "backward"}
    assert all(k["spills"] == 0 and k["registers"] > 0 for k in found["kernels"])
    over_x = [k for k in found["kernels"] if k["over"] == "x"]
    assert all("128" in k["loads"] for k in over_x)
    assert list((tmp_path / "kept").rglob("*.cubin"))
    text = (tmp_path / "table.md").read_text()
    assert "4x16x8x8" in text
    assert text.count("| silu |") == len(found["kernels"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("silu", "--arch", "sm_91"), ("sm_91", "sm_90")),
        (("silu", "--shape", "8"), ("8", "samples x channels")),
        (("silu", "--shape", "8x-1"), ("8x-1", "samples x channels")),
        (("silu", "--dtype", "float8"), ("float8", "float16")),
        (("slu",), ("slu", "silu")),
        (("silu", "--arch", "sm_90,H200"), ("H200", "sm_90")),
        (("silu", "--processes", "0"), ("--processes", "1")),
        (("silu", "--out", "table.txt"), ("table.txt", "table.md")),
    ],
)
def test_wrong_usage(call, arguments, words):
    status, out, err = call("compile", *arguments)
    assert (status, out) == (2, "")
    for word in words:
        assert word in err


def test_bytes_by_schedule(call, importable, tmp_path, folder):
    importable("triton")
    status, out, err = call("bytes", "evonorm-s0", "silu", "--out", "bytes.md", "--json")
    assert status == 0, err
    found = {(t["layer"], t["direction"], t["schedule"]): t for t in json.loads(out)["traffic"]}
    resident, universal = (found["evonorm-s0", "forward", kind] for kind in "RU")
    assert (resident["chosen"], universal["chosen"]) == (True, False)
    assert (resident["read"], resident["written"]) == (1, 1)
    assert (universal["read"], universal["written"]) == (2, 1)
    assert resident["total"] <= universal["total"]
    text = (tmp_path / "bytes.md").read_text()
    assert "nas kernels bytes evonorm-s0 silu --shape" in text
    assert text.count("| silu |") == 2
    assert call("bytes", "evonorm-s0", "--out", "bytes.json")[0] == 0
    assert len(json.loads((tmp_path / "bytes.json").read_text())) == 4
    assert call("bytes", "slu")[0] == 2


def test_compile_without_triton(call, monkeypatch):
    monkeypatch.setattr("kernels.backend.HAVE_TRITON", False)
    status, _, err = call("compile", "silu")
    assert status == 1
    assert "Triton is not installed" in err


# -- the cache and times -----------------------------------------------------------------------------------------


def test_list_and_clear(call, folder):
    assert json.loads(call("list", "--json")[1])["files"] == []
    for number in range(30):
        cache.write_source(str(number), f"# {number}\n")
    status, out, _ = call("list")
    assert status == 0
    assert "and 10 older ones" in out
    assert "30 of at most" in out
    found = json.loads(call("list", "--json")[1])
    assert len(found["files"]) == 30
    assert found["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert json.loads(call("clear", "--json")[1])["removed"] == 30
    assert not list(folder.iterdir())
    assert "0 files removed" in call("clear")[1]


def test_ages_are_read_easily():
    assert [commands._age(s) for s in (5, 60, 3599, 7200, 90000)] == [
        "just now",
        "1 minute ago",
        "59 minutes ago",
        "2 hours ago",
        "1 day ago",
    ]


def test_bench_times_layers(call):
    status, out, err = call("bench", "evonorm-s0", "silu", "--shape", "4x8x4x4", "--rounds", "5", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [f["layer"] for f in found["layers"]] == ["evonorm-s0", "silu"]
    for entry in found["layers"]:
        assert entry["eager_ms"] > 0
        assert entry["fused_ms"] > 0
    assert found["shape"] == [4, 8, 4, 4]


def test_bench_says_what_has_no_kernels(call):
    mixed = "x / std[channel](x) + mean[instance](x)"
    status, out, err = call("bench", mixed, "--shape", "2x4x3", "--rounds", "5", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert "fused_ms" not in found["layers"][0]
    assert "over positions" in found["warnings"][0]
