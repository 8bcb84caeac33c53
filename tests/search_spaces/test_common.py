"""Errors, names, files, foreign pickles."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from search_spaces.common.errors import RunError, UserError, one_of
from search_spaces.common.files import atomic_write, home, locked
from search_spaces.common.names import load_object, match, nearest
from search_spaces.common.pickles import load_pickle


def test_an_error_names_value_expectation_and_suggestion():
    error = UserError("nas-bench-202", "a search space", "nas-bench-201")
    assert str(error) == "'nas-bench-202': expected a search space; did you mean 'nas-bench-201'?"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.suggestion) == (UserError, str(error), "nas-bench-201")
    assert one_of("abc", limit=2) == "one of a, b and 1 more"


def test_names_match_in_any_spelling():
    assert (
        match("Regularized_Evolution", ["random-search", "regularized-evolution"], "a strategy")
        == "regularized-evolution"
    )
    assert nearest("xyzzy", ["random-search"]) is None
    with pytest.raises(UserError, match="did you mean 'random-search'"):
        match("random-serach", ["random-search"], "a strategy")


@pytest.mark.parametrize("path", ["numpy", "numpy:", "nonexistent_module:x", "numpy:arrray"])
def test_objects_that_are_not_there_are_named(path):
    with pytest.raises(UserError):
        load_object(path, "an object")
    assert load_object("numpy:array", "an object") is np.array


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("NASFORGE_HOME")
    assert home().name == "nasforge"


def test_atomic_write_leaves_the_old_file_on_any_failure(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        print({}["new"], file=file)
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"), atomic_write(path) as file:
        file.write("new")  # reaches the disk when the block ends
    monkeypatch.setattr(os, "fsync", real)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~int(subprocess.check_output(["sh", "-c", "umask"]), 8)
    with pytest.raises(UserError), atomic_write(tmp_path / "file.txt" / "below"):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    program = (
        "import sys, time\nfrom search_spaces.common.files import locked\n"
        f"with locked({str(tmp_path / 'lock')!r}):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with locked(tmp_path / "lock", wait=False):
        pass


class Attack:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.system, "echo pwned"),
        Attack(eval, "1 + 1"),
        Attack(getattr, np, "load"),
        {"nested": [Attack(exec, "pass")]},
        Attack(np.load, "file"),
        np.array([object()], dtype=object),
    ],
)
def test_a_pickle_that_would_run_code_is_refused(attack):
    try:
        data = pickle.dumps(attack)
    except Exception:
        data = pickle.dumps({"x": 1})[:-1]
    with pytest.raises(UserError, match="bad.pkl"):
        load_pickle(io.BytesIO(data), "bad.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_at_any_protocol(protocol):
    import collections

    value = {"a": [1, 2.5, None, True], "b": np.arange(3.0), "c": np.float32(2), 3: collections.OrderedDict(x=b"y")}
    found = load_pickle(io.BytesIO(pickle.dumps(value, protocol)), "good.pkl")
    np.testing.assert_array_equal(found.pop("b"), value.pop("b"))
    assert found == value


def test_strings_of_python_2():
    """Protocol 2 as Python 2 wrote it: U is a byte string, of any bytes."""
    data = b"\x80\x02}U\x01kU\x02\xff\x00s."
    assert load_pickle(io.BytesIO(data), "old.pkl", encoding="bytes") == {b"k": b"\xff\x00"}
    assert load_pickle(io.BytesIO(data), "old.pkl", encoding="latin1") == {"k": "\xff\x00"}
    with pytest.raises(UserError, match="old.pkl.*a complete pickle"):
        load_pickle(io.BytesIO(data), "old.pkl")


def test_truncated_pickles_are_named():
    data = pickle.dumps(list(range(1000)))
    for end in (0, 1, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(UserError, match="cut.pkl"):
            load_pickle(io.BytesIO(data[:end]), "cut.pkl")
