"""The files of generated source: written once, mended, bounded, shared by workers, never in the way."""

from __future__ import annotations

import inspect
import os
import threading
import time
import warnings

import pytest

from kernels import cache


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NASFORGE_HOME", str(tmp_path))
    cache._temporary_folder.cache_clear()
    return tmp_path


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


def test_source_is_known_to_inspect_even_when_the_file_is_gone():
    text = "import inspect\ndef f():\n    return 1\nseen = inspect.getsource(f)\n"
    path = cache.write_source("key", text)
    path.unlink()
    module = cache.load(path, text)
    assert module.seen == "def f():\n    return 1\n"
    assert cache.write_source("key", text) == path
    assert inspect.getsource(module.f) == module.seen


def test_a_folder_that_cannot_be_written_is_replaced_with_one_warning(home):
    (home / "kernels").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        path = cache.write_source("key", "a = 1\n")
    assert path.read_text() == "a = 1\n"
    assert home not in path.parents
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.write_source("key", "a = 1\n") == path
        assert cache.entries() == []
