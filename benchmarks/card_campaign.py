"""Measure a designed grid of configurations on the card at hand, in one command and within a few minutes.

    python benchmarks/card_campaign.py [--minutes 9] [--out FILE.jsonl]
    python benchmarks/card_campaign.py --dry-run [--most 6]     the same program on a CPU, with tiny shapes

Points are ordered by value and interleaved over workloads, dtypes, losses, checkpointing and accumulation; the eager
ones first, at most a dozen compiled ones last. Each takes a few optimizer steps in this process. A point that the file
holds already is passed over, so several runs add up. Rows are what tests/data/measured/ takes as they are: the
configuration, what torch allocated and reserved, what the driver saw, retries, seconds, and our estimate beside it.
The caps make a large card behave like one of 8, 10, 12, 16 and 24 GB: the points run under one that should hold them,
each in turn, and a plan recommended for each cap is run under it. The attention kernel is forced to the one that the
table is written for, because data-centre cards may choose another. At the end it prints the errors of the rows that
were held out and of the others, and writes the allocator's own event trace of three small configurations to traces/
beside the rows (tests/data/traces takes them as they are).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vramplan import __version__
from vramplan.device import live_gpu
from vramplan.errors import ConfigError, DoesNotFitError
from vramplan.memory_probe.card import CardMeasurement, measure_card
from vramplan.planner.allocator_trace import replay_trace
from vramplan.planner.attention import Kernel
from vramplan.planner.gpu import Budget, Gpu, find_gpu
from vramplan.planner.memory import attention_kernel, estimate, peak_allocated
from vramplan.planner.plan import make_plan
from vramplan.planner.search import Grid
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig, check, check_step, release
from vramplan.units import GIB, MIB

SIZES = {
    "41M": Shape(n_layer=12, n_head=12, n_embd=384),
    "58M": Shape(n_layer=12, n_head=12, n_embd=480),
    "64M": Shape(n_layer=12, n_head=8, n_embd=512),
    "77M": Shape(n_layer=12, n_head=12, n_embd=576),
    "112M": Shape(n_layer=12, n_head=12, n_embd=720),
    "124M": Shape(n_layer=12, n_head=12, n_embd=768),
    "124M bias untied": Shape(n_layer=12, n_head=12, n_embd=768, bias=True, tied=False),
    "127M modern": Shape(
        n_layer=14, n_head=12, n_embd=768, norm="rmsnorm", positions="rotary", mlp="swiglu", n_kv_head=4, qk_norm=True
    ),
    "355M": Shape(n_layer=24, n_head=16, n_embd=1024),
    "774M": Shape(n_layer=36, n_head=20, n_embd=1280),
    "30M wide vocabulary": Shape(n_layer=6, n_head=6, n_embd=384),
}
CAPS_GB = (8, 10, 12, 16, 24)
COMPILED = 12
"""So many points at most are compiled, which takes long: nine of the grid, and three recommended plans."""
COMPILED_PLANS = (("77M", 8), ("124M", 12), ("355M", 16))
POINTS = 150
ROOM = 1.1
"""A cap leaves an estimate so much at least."""
HELD_OUT = 3
"""One row in so many, by its hash, is not to be looked at when the table is corrected."""


@dataclass(frozen=True)
class Point:
    """One configuration, or a plan to be made and run under a cap."""

    shape: Shape
    step: StepConfig
    cap_bytes: int | None = None
    why: str = "grid"

    @property
    def key(self) -> str:
        """Identifies the row in the file."""
        text = json.dumps([asdict(self.shape), asdict(self.step), self.cap_bytes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def grid(dry: bool) -> Iterator[Point]:
    """The points, most valuable first."""
    base = StepConfig(batch_size=8, grad_accum=1)
    eager = [
        ("124M", {}), ("124M", {"loss": "full"}), ("124M", {"dtype": "float32"}), ("124M", {"checkpointing": "block"}),
        ("124M", {"grad_accum": 4}), ("124M", {"loss": "full", "workload": "nanogpt"}),
        ("127M modern", {}), ("124M", {"checkpointing": "selective"}),
        ("124M", {"loss": "full", "workload": "autocast", "optimizer": "adamw-foreach"}),
        ("124M", {"loss": "full", "workload": "plain", "dropout": 0.1}), ("355M", {"grad_accum": 2}),
        ("124M bias untied", {"grad_accum": 2, "loss": "full"}), ("77M", {"loss": "full", "batch_size": 16}),
        ("77M", {"batch_size": 16, "grad_accum": 2}), ("124M", {"dtype": "float16", "loss": "full"}),
        ("124M", {"optimizer": "adamw-foreach"}), ("355M", {"checkpointing": "block", "batch_size": 16}),
        ("774M", {"batch_size": 2}), ("774M", {"checkpointing": "block"}), ("41M", {"batch_size": 32}),
        ("124M", {"loss_chunk_tokens": 4096}), ("124M", {"loss": "full", "dtype": "float32", "batch_size": 4}),
        ("124M", {"loss": "full", "workload": "nanogpt", "grad_accum": 4}),
        ("124M", {"loss": "full", "workload": "plain", "dtype": "float32", "batch_size": 4}),
        ("124M", {"loss": "full", "workload": "autocast", "dtype": "float32", "batch_size": 4}),
        ("355M", {"loss": "full", "workload": "nanogpt", "batch_size": 4}),
        ("30M wide vocabulary", {"batch_size": 32, "checkpointing": "block"}),
        ("124M", {"batch_size": 1}), ("124M", {"batch_size": 2, "grad_accum": 2}), ("124M", {"batch_size": 32}),
        ("355M", {"optimizer": "muon", "checkpointing": "block"}),
        ("127M modern", {"dtype": "float32", "loss": "full"}),
        ("124M", {"dtype": "pure-bfloat16", "optimizer": "adamw-stochastic"}), ("355M", {"optimizer": "adamw-offload"}),
        ("355M", {"optimizer": "adamw-in-backward"}), ("127M modern", {"checkpointing": "selective", "grad_accum": 2}),
        ("64M", {"batch_size": 16}), ("112M", {"loss": "full"}), ("58M", {"loss": "full", "workload": "nanogpt"}),
        ("124M", {"dtype": "float16", "loss": "full", "workload": "nanogpt"}), ("355M", {"dtype": "float16"}),
    ]  # fmt: skip
    compiled = [
        ("124M", {}), ("124M", {"loss": "full"}), ("124M", {"loss": "full", "workload": "nanogpt"}),
        ("124M", {"grad_accum": 4, "loss": "full"}), ("124M", {"checkpointing": "block"}),
        ("77M", {"loss": "full", "workload": "nanogpt", "batch_size": 16}), ("124M", {"dtype": "float32"}),
        ("355M", {"grad_accum": 2}), ("124M bias untied", {"loss": "full"}),
    ]  # fmt: skip
    for size, settings in eager:
        yield _point(size, replace(base, **settings), dry)
    for block_size, batch_size in ((256, 32), (512, 16), (2048, 4), (4096, 2)):
        point = _point("124M", replace(base, batch_size=batch_size), dry)
        yield replace(point, shape=replace(point.shape, block_size=block_size if not dry else block_size // 64))
    for size, settings in compiled:
        yield _point(size, replace(base, compile=True, **settings), dry)


def _point(size: str, step: StepConfig, dry: bool) -> Point:
    if not dry:
        return Point(SIZES[size], step)
    keys = min(1, SIZES[size].n_kv_head)
    shape = replace(SIZES[size], n_layer=2, n_head=2, n_embd=32, vocab_size=128, block_size=32, n_kv_head=keys)
    step = replace(step, batch_size=2, device="cpu", dtype="float32", loss_chunk_tokens=32, dropout=0.0, compile=False)
    if check_step(step):
        step = replace(step, optimizer="adamw-fused")
    return Point(shape, step)


def sampled(count: int, most_bytes: int) -> Iterator[Point]:
    """Random legal eager points, always the same ones, whose tensors fit; for when the chosen ones are done."""
    rng = random.Random(0)
    known: set[str] = set()
    while len(known) < count:
        workload = rng.choice(("vramplan", "vramplan", "nanogpt", "autocast"))
        ours = workload == "vramplan"
        step = StepConfig(
            batch_size=rng.choice((1, 2, 4, 8, 16, 32)), grad_accum=rng.choice((1, 2, 4)), workload=workload,
            dtype=rng.choice(("bfloat16", "float32", "float16")),
            loss=rng.choice(("chunked", "full")) if ours else "full",
            checkpointing=rng.choice(("none", "block", "selective")) if ours else "none",
        )  # fmt: skip
        named = [shape for name, shape in SIZES.items() if ours or not shape.variant]
        point = Point(replace(rng.choice(named), block_size=rng.choice((256, 512, 1024, 2048))), step, why="sampled")
        fits = int(peak_allocated(point.shape, step)) < most_bytes
        if fits and not check(point.shape, step) and point.key not in known:
            known.add(point.key)
            yield point


def recommended(gpu: Gpu | None) -> Iterator[Point]:
    """The plan that the planner recommends for targets under each cap, to be run under it."""
    for cap in CAPS_GB:
        for size in ("77M", "124M", "355M", "774M"):
            budget = int(cap * 1e9)
            shape = SIZES[size]
            compiles = ((size, cap) in COMPILED_PLANS,)
            found = Grid(
                shapes=(shape,), tokens_per_step=32 * shape.block_size, dtypes=("bfloat16",), compiles=compiles
            )
            try:
                plans = make_plan(found, gpu, Budget(total_bytes=budget, reserve_bytes=0), max_risk=0.01, top=1)
            except DoesNotFitError as error:
                print(f"{size} under {cap} GB: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            yield Point(plans.plans[0].shape, plans.plans[0].step, budget, f"recommended under {cap} GB")


def capped(points: Iterable[Point], gpu: Gpu | None) -> Iterator[Point]:
    """Each point of the grid under the next of the caps that should hold it; under none where none does."""
    for turn, point in enumerate(points):
        needed = ROOM * estimate(point.shape, point.step, gpu).process_bytes
        fitting = [cap for cap in CAPS_GB if needed <= cap * 1e9]
        yield replace(point, cap_bytes=int(fitting[turn % len(fitting)] * 1e9) if fitting else None)


def row(point: Point, measured: CardMeasurement, gpu: Gpu | None, card: str) -> dict[str, Any]:
    """What the file holds of one point."""
    full = estimate(point.shape, point.step, gpu)
    model = {name: getattr(point.shape, name) for name in Shape.__dataclass_fields__}
    step = {name: getattr(point.step, name) for name in StepConfig.__dataclass_fields__}
    found = asdict(measured)
    found["final_loss"] = found.pop("loss")  # the configuration has a loss of its own
    whole = measured.outcome == "fits"
    found["peak_mib"] = found["allocated_bytes"] / MIB if whole and found["allocated_bytes"] else None
    found["reserved_gib"] = found["reserved_bytes"] / GIB if whole and found["reserved_bytes"] else None
    return {
        "name": f"{point.shape.label} {point.step.workload} {point.step.dtype} b{point.step.batch_size}", "gpu": card,
        **model, **step, "key": point.key, "why": point.why, "cap_bytes": point.cap_bytes,
        "held_out": int(point.key, 16) % HELD_OUT == 0, "torch": ".".join(map(str, release(torch.__version__))),
        "torch_build": torch.__version__, "vramplan": __version__, "attention": kernel_of(point, gpu), **found,
        "estimated_allocated_bytes": full.peak_allocated_bytes,
        "estimated_reserved_bytes": full.peak_reserved_bytes, "source": "benchmarks/card_campaign.py",
    }  # fmt: skip


BACKENDS: dict[Kernel, str] = {
    "flash": "FLASH_ATTENTION", "padded flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH",
}  # fmt: skip


def kernel_of(point: Point, gpu: Gpu | None) -> str:
    """The attention kernel that the table is written for, by torch's name of the backend."""
    return "" if point.step.device == "cpu" else BACKENDS[attention_kernel(point.shape, point.step, gpu)]


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """No other attention kernel runs within; a step that needs another fails."""
    with contextlib.ExitStack() as stack:
        if backend:
            stack.enter_context(sdpa_kernel([getattr(SDPBackend, backend)]))
        yield


def traces(directory: Path, device: torch.device, gpu: Gpu | None, card: str) -> None:
    """The allocator's own events of a few steps, as (action, bytes, address): what the replay is checked against."""
    directory.mkdir(parents=True, exist_ok=True)
    shape = Shape(n_layer=4, n_head=8, n_embd=512, vocab_size=8192, block_size=512)
    for step in (
        StepConfig(batch_size=8), StepConfig(batch_size=8, loss="full", grad_accum=2),
        StepConfig(batch_size=8, loss="full", workload="nanogpt"),
    ):  # fmt: skip
        torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python", context=None)
        with forced(kernel_of(Point(shape, step), gpu)):
            measure_card(shape, step, device, steps=3)
        snapshot = torch.cuda.memory._snapshot(device)
        torch.cuda.memory._record_memory_history(enabled=None)
        events = [[e["action"], e["size"], e["addr"]] for e in snapshot["device_traces"][device.index or 0]]
        name = f"{step.workload}-{step.loss}-x{step.grad_accum}.json"
        about = {"gpu": card, "torch": torch.__version__, "model": asdict(shape), "step": asdict(step)}
        (directory / name).write_text(json.dumps({**about, "events": events}), encoding="utf-8")
        found = replay_trace([tuple(event) for event in events])
        print(f"trace {name}: {found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop before so many minutes have passed")
    parser.add_argument("--out", type=Path, default=Path("card_campaign.jsonl"))
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on this CPU: does the program work?")
    parser.add_argument("--most", type=int, help="stop after so many new points")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --dry-run runs the same program on the CPU")
    end = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    live = None if arguments.dry_run else live_gpu()
    card = live.name if live else "CPU"
    try:
        gpu = find_gpu(card, total_bytes=live.total_bytes) if live else None
    except ConfigError:
        gpu = None
    done = (
        {json.loads(line)["key"] for line in arguments.out.read_text().splitlines()}
        if arguments.out.exists()
        else set()
    )
    points = list(grid(arguments.dry_run))
    if live:
        points = [*capped(points, gpu), *recommended(gpu)]
        points += capped(sampled(POINTS - len(points), int(0.8 * live.free_bytes)), gpu)
    new = {point.key: point for point in points if point.key not in done and not check_step(point.step)}
    eager_first = sorted(new.values(), key=lambda point: point.step.compile)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as out:
        for point in eager_first[: arguments.most]:
            if time.monotonic() > end - (40 if point.step.compile else 8):
                print("time is up", file=sys.stderr)
                break
            try:
                with forced(kernel_of(point, gpu)):
                    measured = measure_card(point.shape, point.step, device, cap_bytes=point.cap_bytes)
            except Exception as error:  # one point that fails for another reason must not cost the others
                print(f"{point}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            found = row(point, measured, gpu, card)
            out.write(json.dumps(found) + "\n")
            out.flush()
            _show(found)
    _errors([json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()])
    if device.type == "cuda" and time.monotonic() < end:
        traces(arguments.out.parent / "traces", device, gpu, card)


def _errors(rows: list[dict[str, Any]]) -> None:
    """What the estimates were off by, for the rows that were held out and for the others."""
    for words, held_out in (("held out", True), ("others", False)):
        for kind, name in (("allocated", "peak_mib"), ("reserved", "reserved_gib")):
            chosen = [row for row in rows if row["held_out"] is held_out and row[name]]
            errors = [abs(row[f"estimated_{kind}_bytes"] / row[f"{kind}_bytes"] - 1) for row in chosen]
            if errors:
                figures = f"median {statistics.median(errors):.3%}, worst {max(errors):.3%}"
                print(f"{words}: {kind} {figures} of {len(errors)} rows")


def _show(found: dict[str, Any]) -> None:
    parts = [f"{found['name']:44} {found['loss']:8} x{found['grad_accum']} {'compiled' if found['compile'] else ''}"]
    for kind in ("allocated", "reserved"):
        real, ours = found[f"{kind}_bytes"], found[f"estimated_{kind}_bytes"]
        parts.append(f"{kind} {real / MIB:9.1f} MiB {ours / real - 1:+.3%}" if real else f"{kind} n/a")
    cap = f" cap {found['cap_bytes'] / GIB:.1f} GiB" if found["cap_bytes"] else ""
    print(" ".join(parts), f"retries {found['retries']} {found['outcome']}{cap}", flush=True)


if __name__ == "__main__":
    main()
