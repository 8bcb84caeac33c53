"""Run as a script in a process of its own: does Triton work here? Prints one JSON object {"kernel", "error"}.

With a GPU one kernel runs and its result is checked; without one it is compiled ahead of time for sm_90 (Hopper).
"""

import ctypes
import json

import triton
import triton.language as tl


@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + places, mask=places < n, other=0.0)
    tl.store(y + places, values + 1.0, mask=places < n)


def compiled() -> str:
    """Compile for a GPU that need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=add_one, signature=signature, constexprs={(3,): 128})
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    if not binary.asm.get("cubin"):
        raise RuntimeError("the compiler returned no binary")
    return "compiled for sm_90"


def ran() -> str:
    """Run on the GPU that is here."""
    import torch

    x = torch.arange(300, device="cuda", dtype=torch.float32)
    y = torch.full_like(x, float("nan"))
    add_one[(3,)](x, y, 300, BLOCK=128)
    if not torch.equal(y, x + 1):
        raise RuntimeError("the kernel returned wrong numbers")
    return f"ran on {torch.cuda.get_device_name()}"


def has_gpu() -> bool:
    """Whether the NVIDIA driver finds a GPU; asked of the driver itself, importing torch takes longer."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


if __name__ == "__main__":
    report: dict[str, str | None] = {"kernel": None, "error": None}
    try:
        report["kernel"] = ran() if has_gpu() else compiled()
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(json.dumps(report))
