"""One huge pickle in bounded memory: every architecture's record is reduced to its few numbers as it is completed.

The official NAS-Bench-201 and NATS files are one dict of gigabytes. `StreamingUnpickler` builds it in order, as pickle
does, but each finished dict passes through `reduce`, which may empty it; what the pickle memo holds of emptied
records is forgotten. Nothing that a file names is ever called but the plain values of `search_spaces.common.pickles`.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable
from typing import IO, Any, ClassVar

import numpy as np

from search_spaces.common.pickles import PLAIN

_PurePython: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the library's reader that can be overridden
_CHUNK = 1 << 20
_LAG = 8  # reductions that a memo entry outlives
# {small int: float, ...}, a metric by epoch, is most of such a file; a run of it is read at once.
_CURVE = re.compile(rb"(?:K.G.{8}){2,}", re.DOTALL)
_CURVE_ENTRY = np.dtype([("_", "u1"), ("epoch", "u1"), ("__", "u1"), ("value", ">f8")])


class Source:
    """Buffered reading with a look ahead."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._data = b""
        self._at = 0

    def read(self, count: int) -> bytes:
        """`count` bytes. Errors: EOFError."""
        end = self._at + count
        while end > len(self._data):
            more = self._file.read(max(_CHUNK, min(end - len(self._data), 64 * _CHUNK)))
            if not more:
                raise EOFError("the file ends too early")
            self._data = self._data[self._at :] + more
            self._at, end = 0, count
        data = self._data[self._at : end]
        self._at = end
        return data

    def readline(self) -> bytes:
        """One line with its end."""
        line = bytearray()
        while not line.endswith(b"\n"):
            line += self.read(1)
            if len(line) > 4096:
                raise pickle.UnpicklingError("an endless line")
        return bytes(line)

    def take(self, pattern: re.Pattern[bytes]) -> bytes:
        """What `pattern` matches right here within the buffer, or nothing."""
        found = pattern.match(self._data, self._at)
        if found is None:
            return b""
        self._at = found.end()
        return found[0]


class StreamingUnpickler(_PurePython):
    """Reads one pickle from `source`. `reduce` sees each dict when its items are set and says whether it emptied it.

    Tensors become None and their storages are not read. Errors: anything a broken pickle can raise.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(_PurePython.dispatch)

    def __init__(self, source: Source, reduce: Callable[[dict], bool] = lambda content: False):
        super().__init__(source)
        self._source = source
        self._reduce = reduce
        self._memoised = 0  # entries ever made: MEMOIZE counts them, whether forgotten or not
        self._recent: list[int] = []
        self._generations: list[list[int]] = []
        self._boundary = 0  # above it: entries of the record being read
        self._used: set[int] = set()  # entries that a later record refers to, such as attribute names

    def load(self) -> Any:
        """The object, with its reduced parts. Errors: UnpicklingError, EOFError and what broken data raise."""
        self.memo: dict[int, Any] = {}
        self.metastack: list[list] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        self.read, self.readline, self.readinto = self._source.read, self._source.readline, None
        dispatch, read = self.dispatch, self.read
        try:
            while True:
                code = read(1)[0]
                if code not in dispatch:
                    raise pickle.UnpicklingError(f"an unknown opcode {code}")
                dispatch[code](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if name == "set" and module in ("builtins", "__builtin__"):
            return set
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return _no_tensor
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _Storage
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table has no use for")

    def persistent_load(self, identity: object) -> None:
        """A tensor's storage: left where it is."""

    # -- memory ------------------------------------------------------------------------------------------------

    def _remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]
        self._memoised += 1
        self._recent.append(index)

    def _recall(self, index: int) -> None:
        if index not in self.memo:
            raise pickle.UnpicklingError("it refers to a value that is not there (or to one of a record long past)")
        if index < self._boundary:
            self._used.add(index)
        self.append(self.memo[index])

    def _completed(self) -> None:
        content = self.stack[-1]
        if isinstance(content, dict) and self._reduce(content):
            self._generations.append(self._recent)
            self._boundary = max(self._recent, default=self._boundary) + 1
            self._recent = []
            if len(self._generations) > _LAG:
                self._forget(self._generations.pop(0))

    def _forget(self, indices: list[int]) -> None:
        """Drop entries, but for architectures' names and what is small and has been shared between records."""
        for index in indices:
            value = self.memo.pop(index, None)
            if (index in self._used and _is_small(value)) or (isinstance(value, str) and _is_arch(value)):
                self.memo[index] = value
            self._used.discard(index)

    # -- opcodes -----------------------------------------------------------------------------------------------

    def load_frame(self) -> None:
        self.read(8)  # a hint for readers that fetch ahead

    dispatch[pickle.FRAME[0]] = load_frame

    def load_mark(self) -> None:
        super().load_mark()
        curve = self._source.take(_CURVE)
        if curve:
            entries = np.frombuffer(curve, _CURVE_ENTRY)
            items: list[Any] = [None] * (2 * len(entries))
            items[::2], items[1::2] = entries["epoch"].tolist(), entries["value"].tolist()
            self.stack.extend(items)

    dispatch[pickle.MARK[0]] = load_mark

    def load_setitem(self) -> None:
        super().load_setitem()
        self._completed()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        super().load_setitems()
        self._completed()

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_memoize(self) -> None:
        self._remember(self._memoised)

    dispatch[pickle.MEMOIZE[0]] = load_memoize

    def load_put(self) -> None:
        self._remember(int(self.readline()[:-1]))

    dispatch[pickle.PUT[0]] = load_put

    def load_binput(self) -> None:
        self._remember(self.read(1)[0])

    dispatch[pickle.BINPUT[0]] = load_binput

    def load_long_binput(self) -> None:
        self._remember(struct.unpack("<I", self.read(4))[0])

    dispatch[pickle.LONG_BINPUT[0]] = load_long_binput

    def load_get(self) -> None:
        self._recall(int(self.readline()[:-1]))

    dispatch[pickle.GET[0]] = load_get

    def load_binget(self) -> None:
        self._recall(self.read(1)[0])

    dispatch[pickle.BINGET[0]] = load_binget

    def load_long_binget(self) -> None:
        self._recall(struct.unpack("<I", self.read(4))[0])

    dispatch[pickle.LONG_BINGET[0]] = load_long_binget

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(struct.unpack("<Q", self.read(8))[0])))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def load_build(self) -> None:
        """Only numpy values have a state worth setting; a file does not get to set attributes of anything else."""
        if isinstance(self.stack[-2], (np.dtype, np.ndarray)):
            super().load_build()
        else:
            self.stack.pop()

    dispatch[pickle.BUILD[0]] = load_build

    def _refused(self) -> None:
        raise pickle.UnpicklingError("an opcode that plain values have no use for")

    for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = _refused
    dispatch[pickle.NEXT_BUFFER[0]] = dispatch[pickle.READONLY_BUFFER[0]] = _refused


class _Storage:
    """Stands for a torch storage class."""


def _no_tensor(*parts: object) -> None:
    return None


def _is_arch(text: str) -> bool:
    return "~" in text or ":" in text


def _is_small(value: object) -> bool:
    if isinstance(value, (str, bytes)):
        return True
    if isinstance(value, (dict, list, tuple)):
        return len(value) <= 16 and not any(isinstance(v, (dict, list)) for v in value)
    return True
