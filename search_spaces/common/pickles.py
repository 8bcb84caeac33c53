"""Foreign pickles, read without running what they contain."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from search_spaces.common.errors import UserError


def _dtype(name: object, *flags: object) -> np.dtype:
    dtype = np.dtype(name, *flags)  # type: ignore[call-overload]
    if dtype.hasobject:
        raise pickle.UnpicklingError("an array of Python objects")
    return dtype


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype=dtype)[0]


def _array_from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)  # how protocol 2 writes bytes


def _reconstruct(kind: type, shape: tuple[int, ...], dtype: bytes) -> np.ndarray:
    return np.ndarray(shape, dtype="b")


PLAIN: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *ignored: {},
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): np.ndarray,
}
for _package in ("numpy.core", "numpy._core"):
    PLAIN[_package + ".multiarray", "scalar"] = _scalar
    PLAIN[_package + ".multiarray", "_reconstruct"] = _reconstruct
    PLAIN[_package + ".numeric", "_frombuffer"] = _array_from_buffer


class RestrictedUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and numpy values; any other name in the file is refused.

    `extra` maps further (module, name) pairs to harmless stand-ins. encoding: of Python 2's strings; `bytes` keeps
    them as bytes.
    """

    def __init__(
        self,
        file: IO[bytes],
        extra: Mapping[tuple[str, str], Callable] | None = None,
        encoding: str = "ASCII",
    ):
        super().__init__(file, encoding=encoding)
        self._allowed = {**PLAIN, **(extra or {})}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table has no use for") from None


def load_pickle(
    file: IO[bytes],
    name: str,
    extra: Mapping[tuple[str, str], Callable] | None = None,
    encoding: str = "ASCII",
) -> Any:
    """Read one restricted pickle; UserError names the file and the reason if it is truncated, wrong or unsafe."""
    try:
        return RestrictedUnpickler(file, extra, encoding).load()
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(name, f"a complete pickle of plain values ({error or type(error).__name__})") from None
