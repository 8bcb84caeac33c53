"""The files of generated source: written once, mended, bounded, shared by workers, never in the way."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import linecache
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from kernels import cache

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    cache._temporary_folder.cache_clear()
    cache.compiled_folder.cache_clear()
    yield tmp_path
    cache.compiled_folder.cache_clear()


def test_a_file_is_written_once_and_found_again(home):
    path = cache.write_source("key", "a = 1\n")
    assert path.parent == home / "kernels"
    os.utime(path, (1, 1))
    assert cache.write_source("key", "a = 1\n") == path
    assert path.stat().st_mtime == 1
    assert cache.write_source("other", "a = 1\n") != path
    assert cache.load(path, "a = 1\n").a == 1
    assert cache.entries()[0] == path
    assert len(cache.entries()) == 2
    assert cache.clear() == 2
    assert cache.entries() == []


@pytest.mark.parametrize("damage", [b"", b"a = ", b"\xff\xfe\x00", b"a = 1\n# more\n"])
def test_a_damaged_file_is_written_again(damage):
    path = cache.write_source("key", "a = 1\n")
    path.write_bytes(damage)
    assert cache.write_source("key", "a = 1\n") == path
    assert path.read_text() == "a = 1\n"


def test_the_oldest_go_when_there_are_too_many():
    for number in range(12):
        path = cache.write_source(str(number), f"a = {number}\n", limit=10)
        os.utime(path, (number + 1, number + 1))
    left = sorted(int(path.read_text().split()[-1]) for path in cache.entries())
    assert left == list(range(2, 12))
    cache.write_source("last", "a = 99\n", limit=4)
    assert len(cache.entries()) <= 4
    assert any(path.read_text() == "a = 99\n" for path in cache.entries())


def test_readers_see_whole_files_only():
    text = "a = 1\n" * 20000
    path = cache.write_source("key", text)
    failures = []
    until = time.monotonic() + 1.5

    def work(number: int) -> None:
        while time.monotonic() < until:
            try:
                if number % 2:
                    path.write_text("damage")  # one worker destroys, all others mend
                elif cache.load(cache.write_source("key", text), text).a != 1:
                    failures.append("wrong")
            except OSError as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.write_source("key", text).read_text() == text
    assert not list(path.parent.glob("*.tmp"))


KERNELS = """import triton
import triton.language as tl


@triton.jit(do_not_specialize=['n'])
def first(x, n, B: tl.constexpr):
    k = tl.arange(0, B)
    if n > 3:
        tl.store(x + k, tl.load(x + k, mask=k < n, other=0.0), mask=k < n)


@triton.jit(do_not_specialize=[])
def second(y, K: tl.constexpr):
    tl.store(y, K)
"""


def test_triton_gets_the_text_that_it_would_find_in_the_file(importable):
    """Bodies are not compiled by Python; what Triton keeps must be that of the same file imported as usual."""
    jit = importable("triton.runtime.jit")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter takes functions as Python compiles them")
    path = cache.write_source("key", KERNELS)
    spec = importlib.util.spec_from_file_location("plain", path)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    path.unlink()  # by another process, before it is read
    module = cache.load(path, KERNELS)
    for name in ("first", "second"):
        found, wanted = getattr(module, name), getattr(plain, name)
        assert isinstance(found, jit.JITFunction)
        assert found.src == wanted.src
        assert jit.get_jit_fn_file_line(found) == jit.get_jit_fn_file_line(wanted)
        assert found.signature == wanted.signature
        for about in ("name", "is_constexpr", "do_not_specialize"):
            assert [getattr(p, about) for p in found.params] == [getattr(p, about) for p in wanted.params]
        assert ast.dump(found.parse()) == ast.dump(wanted.parse())
    assert str(path) not in linecache.cache


def test_the_interpreter_gets_whole_functions(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = "import inspect\ndef f():\n    return 1\nseen = inspect.getsource(f)\n"
    path = cache.write_source("key", text)
    path.unlink()
    module = cache.load(path, text)
    assert module.seen == "def f():\n    return 1\n"
    assert module.f() == 1
    assert cache.write_source("key", text) == path
    assert inspect.getsource(module.f) == module.seen


WORKER = """
import sys, time
from pathlib import Path
from kernels import cache

number, until = int(sys.argv[1]), time.time() + 2.0
wrong = written = 0
while time.time() < until:
    key = (number * 17 + written) % 60
    text = f"a = {key}\\n" * 300
    path = cache.write_source(str(key), text, limit=40)
    wrong += cache.load(path, text).a != key
    try:
        wrong += path.read_text() not in (text, "damage", "")
        if written % 10 == number:
            path.write_text("damage")
    except FileNotFoundError:  # made room for others
        pass
    written += 1
print(wrong, written)
"""


def test_processes_share_the_folder(home):
    """Four processes write, damage, mend and remove the same files; none sees half of one, none is in the way."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error", "-c", WORKER]
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen([*command, str(k)], stdout=pipe, stderr=pipe, text=True, env=environment) for k in range(4)
    ]
    written = 0
    for worker in workers:
        out, err = worker.communicate(timeout=100)
        assert worker.returncode == 0, err
        wrong, count = map(int, out.split())
        assert wrong == 0
        assert count > 20
        written += count
    assert written > 200
    for key in range(60):
        text = f"a = {key}\n" * 300
        assert cache.write_source(str(key), text, limit=40).read_text() == text
    assert len(cache.entries()) <= 40
    assert not list((home / "kernels").glob("*.tmp"))


def test_what_died_processes_left_is_removed(home):
    cache.write_source("key", "a = 1\n")
    old, new = (home / "kernels" / name for name in (".old.tmp", ".new.tmp"))
    old.write_text("half of a f")
    new.write_text("another is writing th")
    os.utime(old, (1, 1))
    assert cache.clear() == 1
    assert not old.exists()
    assert new.exists()


def test_a_carried_folder_of_compiled_kernels_settles(home, monkeypatch):
    first, second = home / "first", home / "second"
    (first / "KEY").mkdir(parents=True)
    (first / "KEY" / "k.cubin").write_bytes(b"code")
    group = {"child_paths": {"k.cubin": str(first / "KEY" / "k.cubin")}}
    (first / "KEY" / "__grp__k.json").write_text(json.dumps(group))
    (first / "BAD").mkdir()
    (first / "BAD" / "__grp__k.json").write_text('{"child_pa')
    assert cache.settle(first) == 0  # nobody marked it
    cache.mark(first)
    assert cache.settle(first) == 0  # it lies where it lay
    first.rename(second)
    assert cache.settle(second) == 1
    ((name, path),) = json.loads((second / "KEY" / "__grp__k.json").read_text())["child_paths"].items()
    assert (name, Path(path).read_bytes()) == ("k.cubin", b"code")
    assert cache.settle(second) == 0
    third = second.rename(home / "third")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(third))
    assert cache.compiled_folder() == third  # as before the first launch of a process
    assert str(third) in (third / "KEY" / "__grp__k.json").read_text()


def test_triton_has_a_folder_that_can_be_written(home, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "triton"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.compiled_folder() == home / "triton"
    cache.compiled_folder.cache_clear()
    (home / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "file"))
    with pytest.warns(RuntimeWarning, match="TRITON_CACHE_DIR"):
        path = cache.compiled_folder()
    assert home not in path.parents
    assert os.environ["TRITON_CACHE_DIR"] == str(path)


def test_a_folder_that_cannot_be_written_is_replaced_with_one_warning(home):
    (home / "kernels").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="cannot be written.*NASFORGE_HOME"):
        path = cache.write_source("key", "a = 1\n")
    assert path.read_text() == "a = 1\n"
    assert home not in path.parents
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.write_source("key", "a = 1\n") == path
        assert cache.entries() == []
