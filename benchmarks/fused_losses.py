"""Other people's fused linear + cross-entropy beside our chunked loss: the same numbers? the memory? the time?

    python benchmarks/fused_losses.py [--pairs 20] [--tokens 2048] [--write]

Candidates: torch's own ``F.linear_cross_entropy`` with chunks (torch 2.13 and later) and Liger's kernel (a CUDA device
and the package ``liger-kernel``). A candidate would be taken if it were equal (loss within 1e-5, gradients within 1e-4
of the full loss in float32; the reported bfloat16 loss within 1e-4 of the float32 one) and clearly smaller or faster.
What is absent is said to be absent. Ours is always there, also compiled and before torch 2.13. Times are ratios of
interleaved pairs in one process; memory is what torch's allocator events say of one forward and backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vramplan.planner.step import StepConfig
from vramplan.trainer.loss import next_token_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
RESULT = Path(__file__).parent / "results" / "fused_losses.json"
CHUNK = 256


def full(x: Tensor, head: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, head.to(x.dtype)).float(), y)


def ours(x: Tensor, head: Tensor, y: Tensor) -> Tensor:
    step = StepConfig(loss="chunked", loss_chunk_tokens=CHUNK, device="cpu", dtype="float32")
    return next_token_loss(x[None], head, y[None], step)


def torchs() -> Loss | None:
    """``F.linear_cross_entropy`` in chunks of as many tokens as ours, where this torch has it."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None) or getattr(F, "LinearCrossEntropyOptions", None)
    if not hasattr(F, "linear_cross_entropy") or options is None:
        return None
    chunked = options(batch_chunk_size=CHUNK)
    return lambda x, head, y: F.linear_cross_entropy(x, head.to(x.dtype), y, options=chunked)


def ligers() -> Loss | None:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda x, head, y: fused(head.to(x.dtype), x, y)


def inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    head = (torch.randn(vocabulary, width, generator=generator) * 0.02).requires_grad_()
    return x, head, torch.randint(0, vocabulary, (tokens,), generator=generator)


def numbers(loss: Loss, dtype: torch.dtype, size: tuple[int, int, int]) -> tuple[float, Tensor, Tensor]:
    x, head, y = inputs(*size, dtype)
    value = loss(x, head, y)
    value.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert head.grad is not None
    return float(value.detach()), x.grad.float(), head.grad.float()


def peak_bytes(loss: Loss, size: tuple[int, int, int]) -> int:
    """The most that one forward and backward allocates beside its inputs, from the CPU allocator's events."""
    x, head, y = inputs(*size, torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        loss(x, head, y).backward()  # type: ignore[no-untyped-call]
    level = top = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            top = max(top, level)
    return top


def ratio(candidate: Loss, reference: Loss, size: tuple[int, int, int], pairs: int) -> list[float]:
    data = inputs(*size, torch.float32)

    def seconds(loss: Loss) -> float:
        start = time.perf_counter()
        loss(*data).backward()  # type: ignore[no-untyped-call]
        data[0].grad = data[1].grad = None
        return time.perf_counter() - start

    for loss in (candidate, reference):
        seconds(loss)
    return [seconds(candidate) / seconds(reference) for _ in range(pairs)]


def judge(name: str, candidate: Loss | None, size: tuple[int, int, int], pairs: int) -> dict[str, Any]:
    if candidate is None:
        return {"name": name, "verdict": "absent here"}
    expected = numbers(full, torch.float32, size)
    found = numbers(candidate, torch.float32, size)
    gradients = [float((a - b).norm() / b.norm()) for a, b in zip(found[1:], expected[1:], strict=True)]
    half = numbers(candidate, torch.bfloat16, size)[0]
    ratios = ratio(candidate, ours, size, pairs)
    row = {
        "name": name,
        "loss_error": abs(found[0] / expected[0] - 1),
        "gradient_error": max(gradients),
        "bfloat16_loss_error": abs(half / expected[0] - 1),
        "memory_against_ours": peak_bytes(candidate, size) / peak_bytes(ours, size),
        "time_against_ours": statistics.median(ratios),
    }
    faults = (
        ("its float32 numbers differ", row["loss_error"] > 1e-5 or row["gradient_error"] > 1e-4),
        ("its bfloat16 loss is not the true mean", row["bfloat16_loss_error"] > 1e-4),
        ("it is neither smaller nor faster", row["memory_against_ours"] > 0.98 and row["time_against_ours"] > 0.95),
    )
    why = ", ".join(words for words, wrong in faults if wrong)
    return row | {"verdict": "the reference" if candidate is ours else f"not taken: {why}" if why else "would be taken"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--write", action="store_true", help=f"keep the rows in {RESULT.name}")
    given = parser.parse_args()
    size = (given.tokens, given.width, given.vocabulary)
    candidates = (("ours, chunked", ours), ("torch F.linear_cross_entropy", torchs()), ("Liger", ligers()))
    rows = [judge(name, candidate, size, given.pairs) for name, candidate in candidates]
    for row in rows:
        print(json.dumps(row))
    if given.write:
        facts = {"torch": torch.__version__, "tokens, width, vocabulary": size, "pairs": given.pairs, "rows": rows}
        RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
