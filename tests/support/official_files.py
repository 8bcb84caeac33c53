"""Small files of the official structure, written for the tests."""

from __future__ import annotations

import base64
import bz2
import io
import json
import pickle
import struct
from pathlib import Path

import numpy as np

DATA_SETS = {  # official data set -> (evaluations at the last epoch, evaluation of every epoch)
    "cifar10-valid": (("ori-test",), "x-valid"),
    "cifar10": ((), "ori-test"),
    "cifar100": (("x-valid", "x-test"), "ori-test"),
    "ImageNet16-120": (("x-valid", "x-test"), "ori-test"),
}


def result(rng: np.random.Generator, data_set: str, seed: int, epochs: int, latency: object) -> dict:
    last, every = DATA_SETS[data_set]
    names = [f"{every}@{e}" for e in range(epochs)] + [f"{name}@{epochs - 1}" for name in last]
    return {
        "name": "infer.tiny",
        "net_state_dict": None,
        "train_acc1es": {e: float(rng.random() * 100) for e in range(epochs)},
        "train_acc5es": None,
        "train_losses": {e: float(rng.random()) for e in range(epochs)},
        "train_times": {e: float(rng.random()) for e in range(epochs)},
        "arch_config": {"name": "infer.tiny", "C": 16, "N": 5, "num_classes": 10},
        "params": 0.123456 if seed == 888 else 0.654321,
        "flop": 12.5,
        "seed": seed,
        "epochs": epochs,
        "latency": latency,
        "eval_names": [every, *last],
        "eval_acc1es": {name: float(rng.random() * 100) for name in names},
        "eval_losses": {name: float(rng.random()) for name in names},
        "eval_times": {name: float(rng.random()) for name in names},
    }


def state(rng: np.random.Generator, index: int, arch: str, epochs: int, seeds: tuple[int, ...]) -> dict:
    latency = {777: [0.01, 0.03], 888: [-1], 999: None}
    return {
        "arch_index": index,
        "arch_str": arch,
        "all_results": {
            (data_set, seed): result(rng, data_set, seed, epochs, latency.get(seed))
            for data_set in DATA_SETS
            for seed in seeds
        },
        "dataset_seed": {data_set: list(seeds) for data_set in DATA_SETS},
        "clear_net_done": True,
    }


def content(archs: list[str], hps: dict[str, int], rng: np.random.Generator) -> dict:
    """The dict of a whole official file; the last (longest) hp has three seeds, every other architecture two."""
    infos = {}
    for index, arch in enumerate(archs):
        infos[index] = {
            hp: state(
                rng, index, arch, epochs, (777,) if epochs != max(hps.values()) else (777, 888, 999)[: 3 - index % 2]
            )
            for hp, epochs in hps.items()
        }
    return {
        "meta_archs": list(archs),
        "total_archs": len(archs),
        "arch2infos": infos,
        "evaluated_indexes": set(range(len(archs))),
    }


def write_bz2(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(bz2.compress(pickle.dumps(value, protocol)))
    return path


def write_simple(folder: Path, value: dict) -> Path:
    folder.mkdir()
    write_bz2(folder / "meta.pickle.pbz2", {"meta_archs": value["meta_archs"]})
    for index, info in value["arch2infos"].items():
        write_bz2(folder / f"{index:06d}.pickle.pbz2", info)
    return folder


# -- NAS-Bench-101 -------------------------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Bit by bit: the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(record: bytes) -> bytes:
    length = struct.pack("<Q", len(record))
    return length + struct.pack("<I", masked(crc32c(length))) + record + struct.pack("<I", masked(crc32c(record)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def metrics(evaluations: list[dict[int, float]], params: int, total: float) -> bytes:
    """A ModelMetrics message: evaluations as {field number: double}, with a checkpoint path each."""
    out = io.BytesIO()
    for evaluation in evaluations:
        body = b"".join(_varint(field << 3 | 1) + struct.pack("<d", v) for field, v in evaluation.items())
        body += _varint(6 << 3 | 2) + _varint(5) + b"ck/pt"
        out.write(_varint(1 << 3 | 2) + _varint(len(body)) + body)
    out.write(_varint(2 << 3) + _varint(params) + _varint(3 << 3 | 1) + struct.pack("<d", total))
    return out.getvalue()


def record_101(module: str, epochs: int, matrix, operations: list[str], message: bytes) -> bytes:
    bits = "".join(str(int(v)) for row in matrix for v in row)
    return json.dumps([module, epochs, bits, ",".join(operations), base64.b64encode(message).decode()]).encode()


# -- an official file of any size ----------------------------------------------------------------------------------


def write_large(path: Path, archs: list[str], hps: dict[str, int], rng: np.random.Generator) -> Path:
    """The pickle of `content(...)` (protocol 2, not compressed), one architecture at a time in the writer's memory.

    All architectures have the numbers of the first one; no string is shared between two of them.
    """
    import pickletools

    one = content(archs[:1], hps, rng)["arch2infos"][0]
    template = pickle.dumps(one, 2)
    parts: list[bytes | int] = []  # bytes, or a memo index that needs an offset
    operations = list(pickletools.genops(template))
    ends = [position for _, _, position in operations[1:]] + [len(template)]
    begin, count = 2, 0  # after PROTO
    for (code, argument, position), end in zip(operations, ends, strict=True):
        if code.name in ("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"):
            parts += [template[begin:position] + (b"r" if "PUT" in code.name else b"j"), int(argument)]
            begin = end
            count = max(count, int(argument) + 1)
    parts.append(template[begin:-1])  # before STOP
    with open(path, "wb") as file:
        file.write(b"\x80\x02}(X\x0a\x00\x00\x00meta_archs](")
        for arch in archs:
            file.write(b"X" + struct.pack("<I", len(arch)) + arch.encode())
        file.write(b"eX\x0a\x00\x00\x00arch2infos}")
        old = archs[0].encode()
        for index, arch in enumerate(archs):
            if index % 1000 == 0:
                file.write(b"u(" if index else b"(")  # pickle sets 1,000 items at a time
            offset = index * count
            body = b"".join(struct.pack("<I", p + offset) if isinstance(p, int) else p for p in parts)
            name = struct.pack("<I", len(arch)) + arch.encode()
            file.write(b"J" + struct.pack("<i", index) + body.replace(struct.pack("<I", len(old)) + old, name))
        file.write(b"uu.")
    return path
