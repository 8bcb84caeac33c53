"""Compiles handwritten kernels for sm_90 without a GPU and prints one JSON object per kernel. Run by the tests in a
process of its own, without the interpreter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.handwritten import gates, launch, planes, rows, sign_packing

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}


class Recorder:
    """Stands for a kernel: a launch is recorded, not run."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch_with(*args, **keywords):
            self.launches.append((self.kernel, grid, args, keywords))

        return launch_with


class Family:
    def __init__(self, module, launches):
        self.module, self.launches = module, launches

    def __getattr__(self, name):
        return Recorder(getattr(self.module, name), self.launches)


def recorded(call) -> list:
    """The launches of `call`, whose launchers believe that they run on a GPU of 132 processors."""
    launches: list = []
    real, modules = launch.kernels, (rows, planes, gates, sign_packing)
    saved = [
        (m, n, getattr(m, n)) for m in modules for n in ("mode", "kernels", "persistent_programs") if hasattr(m, n)
    ]
    for module, name, _ in saved:
        replacement = {
            "mode": lambda x: "triton",
            "kernels": lambda family: Family(real(family), launches),
            "persistent_programs": lambda x: 264,
        }[name]
        setattr(module, name, replacement)
    try:
        call()
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
    return launches


def compile_launch(kernel, args, keywords) -> dict:
    """What a launch compiles to: registers, stack, shared memory, and the widths of global loads and stores."""
    options = {"num_warps": keywords.pop("num_warps", 4)}
    names, signature, constants, attributes = kernel.arg_names, {}, {}, {}
    for index, (name, value) in enumerate(zip(names, args)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and value == 1:
            signature[name], constants[(index,)] = "constexpr", 1
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    for name, value in keywords.items():
        signature[name], constants[(names.index(name),)] = "constexpr", value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True).stdout
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True).stdout
    return {
        "kernel": kernel.__name__,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)", listing)),
        "loads": sorted(re.findall(r"LDG(?:STS)?\.E[^ ]*", listing)),
        "stores": sorted(re.findall(r"STG\.E[^ ]*", listing)),
    }


def images(shape, last=False, dtype=torch.bfloat16):
    x = torch.empty(shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def plane_case(shape, groups, last, act, residual=False, fixed=False):
    x, c = images(shape, last), shape[1]
    r = images(shape, last) if residual else None
    w, b = torch.empty(c), torch.empty(c)
    count = shape[0] * groups if groups else c
    mean, var = torch.empty(count), torch.empty(count)
    planes.forward(x, r, w, b, mean if fixed else None, var if fixed else None, groups, 1e-5, act, 0.5)
    planes.backward(x, x, r, w, b, mean, var, fixed, groups, 1e-5, act, 0.5)


def row_case(size, centred, act, residual):
    x, w, b = torch.empty(size, dtype=torch.bfloat16), torch.empty(size[1]), torch.empty(size[1])
    r = torch.empty_like(x) if residual else None
    rows.forward(x, r, w, b if centred else None, centred, 1e-5, act, 0.5)
    statistics = torch.empty(size[0] if centred else 0), torch.empty(size[0])
    rows.backward(x, r, x, w, b if centred else None, *statistics, centred, act, 0.5)


def gate_case(size, packed, act):
    x = torch.empty(size[0], size[1] * (2 if packed else 1), dtype=torch.bfloat16)
    y = torch.empty(size, dtype=torch.bfloat16)
    gates.gate_forward(x, None if packed else y, act, 3.0)
    gates.gate_backward(y, x, None if packed else y, act, 3.0)


def poly_case(size, with_value):
    x, w, b = torch.empty(size, dtype=torch.bfloat16), torch.empty(3), torch.empty(1)
    value = torch.empty_like(x) if with_value else None
    gates.poly_forward(x, value, w, b, 1e-6)
    gates.poly_backward(x, x, value, w, b, torch.empty(size[0], 3))


def sign_case(samples):
    x = torch.empty(samples, 4096, dtype=torch.bfloat16)
    if samples <= 64:
        sign_packing.sign_words(x)
    sign_packing.sign_agreement(x)


CASES = {  # which of them every run compiles, and which the slow tests, stands there
    "batch-relu": lambda: plane_case((8, 64, 56, 56), 0, False, "relu"),
    "batch-silu-residual-last": lambda: plane_case((8, 64, 14, 14), 0, True, "silu", residual=True),
    "batch-gelu-eval": lambda: plane_case((8, 64, 32, 32), 0, False, "gelu", fixed=True),
    "group-silu": lambda: plane_case((8, 64, 32, 32), 16, False, "silu"),
    "group-silu-residual-14": lambda: plane_case((8, 128, 14, 14), 8, False, "silu", residual=True),
    "row-768": lambda: row_case((512, 768), True, "gelu", True),
    "row-8192": lambda: row_case((512, 8192), True, "silu", True),
    "row-16384": lambda: row_case((64, 16384), False, "identity", True),
    "row-65536": lambda: row_case((64, 65536), True, "silu", False),
    "swiglu": lambda: gate_case((512, 2816), True, "silu"),
    "powlu": lambda: gate_case((512, 2816), False, "powlu-gate"),
    "poly": lambda: poly_case((512, 3072), True),
    "poly-8192": lambda: poly_case((64, 8192), True),
    "sign": lambda: sign_case(64),
    "group-last": lambda: plane_case((8, 256, 8, 8), 4, True, "mish"),
    "group-universal": lambda: plane_case((8, 32, 128, 128), 2, False, "hardswish"),
    "batch-49": lambda: plane_case((8, 512, 7, 7), 0, False, "relu", residual=True),
    "row-odd": lambda: row_case((512, 196), False, "tanh", False),
    "poly-32768": lambda: poly_case((64, 32768), False),
    "sign-128": lambda: sign_case(128),
    "row-32768": lambda: row_case((64, 32768), True, "gelu-tanh", True),
}

if __name__ == "__main__":
    for case in sys.argv[1:]:
        for kernel, _, args, keywords in recorded(CASES[case]):
            print(json.dumps({"case": case, **compile_launch(kernel, args, dict(keywords))}), flush=True)
