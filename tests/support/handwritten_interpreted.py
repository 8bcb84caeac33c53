"""Runs the cases through Triton's interpreter and prints one JSON line each; in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import json
import sys

import handwritten_cases as cases
import torch
from interpreting import prepare

from kernels.handwritten import launch, sign_agreement, sign_words


def print_errors(case: cases.Case, dtype: torch.dtype, **more) -> None:
    for name, error, bound in cases.errors(case, dtype, **more):
        print(json.dumps({"name": name, "error": error, "bound": bound}), flush=True)


def print_check(name: str, holds: bool) -> None:
    print(json.dumps({"name": name, "error": 0.0 if holds else 1.0, "bound": 0.5}), flush=True)


def signs() -> None:
    """Against counts by hand."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for samples, units in ((1, 5), (5, 37), (33, 130), (64, 70)):
            x = torch.randn(samples, units, generator=torch.Generator().manual_seed(samples)).to(dtype)
            x[0, :2] = torch.tensor([0.0, float("nan")])
            positive = [[bool(v > 0) for v in row] for row in x.tolist()]
            words = [sum(1 << b for b in range(samples) if positive[b][u]) for u in range(units)]
            found = [word % 2**64 for word in sign_words(x).tolist()]
            print_check(f"words {samples} {units} {dtype}", found == words)
            agree = [[sum(a == b for a, b in zip(p, q)) for q in positive] for p in positive]
            print_check(f"agreement {samples} {units} {dtype}", sign_agreement(x).tolist() == agree)
    x = torch.randn(128, 9)
    print_check("agreement 128", torch.equal(sign_agreement(x), ((x > 0)[:, None] == (x > 0)).sum(-1)))


def repeats() -> None:
    """The same bits twice."""
    for case in (cases.batch_case((3, 10, 7, 7)), cases.row_case((70, 8)), cases.group_case((2, 12, 7, 7), 3)):
        first, second = (cases.outputs_and_gradients(case.ours, case.draw(torch.float32)) for _ in range(2))
        print_check(f"repeats {case.name}", all(torch.equal(a, b) for a, b in zip(first, second)))


def main(part: str) -> None:
    prepare(sanitize=part == "slow")
    print_check("interpreted", launch.mode(torch.ones(1)) == "interpret")
    if part == "base":
        for case in cases.base_cases():
            print_errors(case, torch.float32)
        for case in [*cases.base_cases()][::4]:
            print_errors(case, torch.float32, expanded=True)
        signs()
        repeats()
    elif part == "traps":
        for case in cases.trap_cases():
            print_errors(case, torch.float32)
        for case in cases.activation_cases():
            print_errors(case, torch.float32)
    elif part == "low":
        for index, case in enumerate(cases.half(cases.base_cases())):
            print_errors(case, (torch.float16, torch.bfloat16)[index % 2])
    else:
        for case in cases.long_cases():
            print_errors(case, torch.float32)
        for case in cases.half(cases.base_cases()):
            print_errors(case, torch.float16)
            print_errors(case, torch.bfloat16)
        for case in cases.half(cases.long_cases()):
            print_errors(case, torch.bfloat16)


if __name__ == "__main__":
    for part in sys.argv[1:]:
        main(part)
