"""TFRecord files and protocol buffers without TensorFlow: framing, CRC-32C, wire format."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from typing import IO, Any

import numpy as np

_BATCH = 4096
_LONGEST = 1 << 24  # a longer record is taken for damage


@cache
def _crc_table() -> np.ndarray:
    """uint32 [256] for the reflected Castagnoli polynomial 0x1EDC6F41 (RFC 3720, appendix B.4)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


def crc32c(records: list[bytes]) -> np.ndarray:
    """uint32 [N]: CRC-32C of each record, byte by byte over all records at once."""
    lengths = np.array([len(r) for r in records])
    order = np.argsort(-lengths, kind="stable")
    longest = int(lengths.max(initial=0))
    data = np.zeros((len(records), longest), np.uint8)
    for row, index in enumerate(order.tolist()):
        data[row, : lengths[index]] = np.frombuffer(records[index], np.uint8)
    data = np.ascontiguousarray(data.T)
    table = _crc_table()
    crc = np.full(len(records), 0xFFFFFFFF, np.uint32)
    # Longest first: the records that still have a byte at `position` are the first `counts[position]`.
    counts = np.searchsorted(-lengths[order], -np.arange(longest), side="left")
    for position, count in enumerate(counts.tolist()):
        active = crc[:count]
        crc[:count] = table[(active ^ data[position, :count]) & 0xFF] ^ (active >> 8)
    result = np.empty(len(records), np.uint32)
    result[order] = crc ^ np.uint32(0xFFFFFFFF)
    return result


def masked(crc: np.ndarray) -> np.ndarray:
    """The rotation and constant under which TFRecord stores a CRC."""
    crc = crc.astype(np.uint32)
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


def read_records(file: IO[bytes]) -> Iterator[bytes]:
    """The records of a TFRecord file in order; the CRC of every length and of every record is checked.

    Errors: ValueError that gives the number of the first broken record.
    """
    number, more = 0, True
    while more:
        lengths: list[bytes] = []
        records: list[bytes] = []
        sums: list[tuple[int, int]] = []
        truncated = False
        while len(records) < _BATCH:
            head = file.read(12)
            if not head:
                more = False
                break
            length = int.from_bytes(head[:8], "little")
            body = file.read(length + 4) if len(head) == 12 and length <= _LONGEST else b""
            if len(body) != length + 4:
                truncated = True
                break
            lengths.append(head[:8])
            records.append(body[:-4])
            sums.append((struct.unpack_from("<I", head, 8)[0], struct.unpack_from("<I", body, length)[0]))
        if records:
            expected = np.array(sums, np.uint32)
            wrong = (masked(crc32c(lengths)) != expected[:, 0]) | (masked(crc32c(records)) != expected[:, 1])
            if wrong.any():
                raise ValueError(f"record {number + int(np.argmax(wrong))} has a wrong checksum")
        if truncated:
            raise ValueError(f"record {number + len(records)} is broken off or no TFRecord")
        number += len(records)
        yield from records


def read_message(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer: int for varints, float for 64 bits, bytes for what has a length.

    Errors: ValueError.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("a broken protocol buffer")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a protocol buffer without wire type {kind}")
        length = varint() if kind == 2 else 8 if kind == 1 else 4
        value = data[at : at + length]
        at += length
        if len(value) != length:
            raise ValueError("a broken protocol buffer")
        yield tag >> 3, value if kind == 2 else struct.unpack("<d" if kind == 1 else "<f", value)[0]
