"""Our estimate beside published formulas, against every real measurement there is.

    python benchmarks/estimator_accuracy.py [--cpu] [--plot FILE.svg]

Rows: tests/data/measured/*.jsonl: peaks of real cards, and of real passes of our trainer on a CPU, which --cpu measures
anew (two minutes). Prints a table and writes benchmarks/results/estimator_accuracy.json. The formulas are written anew
from:

* accelerate: ``accelerate estimate-memory`` (Hugging Face documentation): four times the weights for Adam training;
* DeepSpeed: "ZeRO: Memory Optimizations" (Rajbhandari et al. 2020, section 3.1): 16 bytes a parameter in mixed
  precision with Adam, 16 in float32 as well;
* EleutherAI: the cookbook's transformer calculator: weights, 12 bytes of optimizer, 4 of gradients a parameter,
  activations s b h L (10 + 24 + 5 a s / h), and its 5 GiB of overhead;
* 34sbh: "Reducing Activation Recomputation" (Korthikanti et al. 2022, equation 2), s b h (34 + 5 a s / h) bytes a layer
  in half precision, twice that in float32, beside 16 bytes a parameter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import Estimate, estimate
from vramplan.planner.plan_file import SHAPE_FIELDS
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.units import GIB, MIB

ROOT = Path(__file__).parent.parent
CPU_ROWS = ROOT / "tests/data/measured/cpu.jsonl"
STEP_FIELDS = tuple(StepConfig.__dataclass_fields__)


@dataclass(frozen=True)
class Row:
    """A real peak: what was run, bytes, and whether they are the allocated or the reserved ones."""

    name: str
    shape: Shape
    step: StepConfig
    gpu: str | None
    kind: str
    measured_bytes: int


def measured_rows(folder: Path = ROOT / "tests/data/measured") -> Iterator[Row]:
    """The rows of tests/data/measured that state a peak."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            peak, reserved = row.get("peak_mib"), row.get("reserved_gib")
            if peak is None and reserved is None:
                continue
            shape = Shape(**{name: row[name] for name in SHAPE_FIELDS if name in row})
            step = StepConfig(**{name: row[name] for name in STEP_FIELDS if name in row})
            if peak is not None:
                yield Row(row["name"], shape, step, row["gpu"], "allocated", int(peak * MIB))
            if reserved is not None:
                yield Row(row["name"], shape, step, row["gpu"], "reserved", int(reserved * GIB))


def measure_on_cpu() -> None:
    """Write real passes on this CPU, metered byte for byte, to tests/data/measured/cpu.jsonl."""
    import torch

    from vramplan.memory_probe.cpu import measure_cpu_step

    modern: dict[str, Any] = {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "qk_norm": True}
    shapes = (
        Shape(n_layer=2, n_head=4, n_embd=96, vocab_size=3000, block_size=64),
        Shape(n_layer=6, n_head=2, n_embd=48, vocab_size=384, block_size=64, bias=True),
        Shape(n_layer=4, n_head=4, n_embd=256, vocab_size=4096, block_size=128, tied=False),
        Shape(
            n_layer=3, n_head=4, n_embd=128, vocab_size=2000, block_size=96, n_kv_head=2, logit_softcap=30.0, **modern
        ),
    )
    several: list[dict[str, Any]] = [
        {"loss": loss, "checkpointing": checkpointing, "grad_accum": accum, "dtype": dtype}
        for loss in ("full", "chunked") for checkpointing in ("none", "block") for accum in (1, 2)
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    several += [
        {"checkpointing": "selective"}, {"optimizer": "adamw-foreach", "dtype": "float32"}, {"optimizer": "muon"},
        {"optimizer": "adamw-in-backward"}, {"dtype": "pure-bfloat16", "optimizer": "adamw-stochastic"},
        {"residual": "float32"},
    ]  # fmt: skip
    lines = []
    for shape in shapes:
        for settings in several:
            step = StepConfig(**{"batch_size": 8, "loss_chunk_tokens": 128, "device": "cpu", **settings})
            real = measure_cpu_step((shape, step))
            row: dict[str, Any] = {"name": f"CPU {shape.label} " + " ".join(map(str, settings.values())), "gpu": None}
            row |= {name: getattr(shape, name) for name in SHAPE_FIELDS}
            row |= {name: getattr(step, name) for name in STEP_FIELDS if name != "torch"}
            row |= {"peak_mib": real.peak_bytes / MIB, "persistent_mib": real.persistent_bytes / MIB}
            row |= {"peak_phase": real.peak_phase, "torch": torch.__version__.split("+")[0]}
            lines.append(json.dumps(row | {"source": "benchmarks/estimator_accuracy.py --cpu"}) + "\n")
            print(row["name"], flush=True)
    CPU_ROWS.write_text("".join(lines), encoding="utf-8")


def _ours(row: Row, full: Estimate) -> float:
    return full.peak_allocated_bytes if row.kind == "allocated" else full.peak_reserved_bytes


def _activations(row: Row, constant: float) -> float:
    s, b, h, a = row.shape.block_size, row.step.batch_size, row.shape.n_embd, row.shape.n_head
    scale = 1 if row.step.half else 2
    return float(scale * row.shape.n_layer * s * b * h * (constant + 5 * a * s / h))


def _accelerate(row: Row, _: Estimate) -> float:
    return float(4 * row.shape.parameters * (2 if row.step.half else 4))


def _deepspeed(row: Row, _: Estimate) -> float:
    return float(16 * row.shape.parameters)


def _eleuther(row: Row, _: Estimate) -> float:
    weights = (2 if row.step.half else 4) + 12 + 4
    return weights * int(row.shape.parameters) + _activations(row, 34) + 5 * GIB


def _korthikanti(row: Row, _: Estimate) -> float:
    return 16 * int(row.shape.parameters) + _activations(row, 34)


ESTIMATORS: dict[str, Callable[[Row, Estimate], float]] = {
    "vramplan": _ours,
    "34sbh": _korthikanti,
    "EleutherAI": _eleuther,
    "DeepSpeed": _deepspeed,
    "accelerate": _accelerate,
}


@dataclass(frozen=True)
class Score:
    """Errors as fractions of the measurement; ``wrong_fit``: share of wrong answers to "does it fit?"."""

    rows: int
    median: float
    p95: float
    worst: float
    under: float
    wrong_fit: float


def score(errors: list[float], rows: list[Row]) -> Score:
    """Judge one estimator. "Does it fit?" is asked for capacities around each measurement."""
    absolute = sorted(abs(e) for e in errors)
    answers = [
        ((1 + e) * row.measured_bytes <= share * row.measured_bytes) == (share >= 1)
        for e, row in zip(errors, rows, strict=True)
        for share in (0.5, 0.8, 0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.25, 2.0)
    ]
    return Score(
        rows=len(errors),
        median=statistics.median(absolute),
        p95=absolute[min(len(absolute) - 1, int(0.95 * len(absolute)))],
        worst=absolute[-1],
        under=sum(e < 0 for e in errors) / len(errors),
        wrong_fit=1 - sum(answers) / len(answers),
    )


def plot(path: str, errors: dict[str, list[float]]) -> None:
    """Each estimator's errors, one dot a row, on a symmetric logarithmic axis."""
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("the plot needs matplotlib: pip install matplotlib")
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    for height, (name, values) in enumerate(reversed(errors.items())):
        axes.scatter([100 * v for v in values], [height] * len(values), alpha=0.5, label=name)
    axes.set_yticks(range(len(errors)), list(reversed(errors)))
    axes.set_xscale("symlog", linthresh=1)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("estimate above (+) or below (-) the measured peak, percent")
    axes.set_title("One dot is one measured peak; linear within 1 %, logarithmic beyond", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="measure the passes on a CPU anew")
    parser.add_argument("--plot", metavar="FILE", help="write a plot (needs matplotlib)")
    arguments = parser.parse_args()
    if arguments.cpu:
        measure_on_cpu()
    rows = list(measured_rows())
    full = [estimate(row.shape, row.step, find_gpu(row.gpu) if row.gpu else None) for row in rows]
    errors = {
        name: [ask(row, e) / row.measured_bytes - 1 for row, e in zip(rows, full, strict=True)]
        for name, ask in ESTIMATORS.items()
    }
    scores: dict[str, dict[str, Any]] = {}
    for group, which in (("cards", True), ("CPU", False)):
        chosen = [i for i, row in enumerate(rows) if (row.gpu is not None) is which]
        if not chosen:
            continue
        print(f"\n{group}, {len(chosen)} rows {'median':>12} {'p95':>9} {'worst':>9} {'under':>7} {'wrong fit':>10}")
        for name, found in errors.items():
            s = score([found[i] for i in chosen], [rows[i] for i in chosen])
            scores.setdefault(group, {})[name] = {k: round(v, 5) for k, v in asdict(s).items()}
            print(f"{name:18} {s.median:12.2%} {s.p95:9.2%} {s.worst:9.2%} {s.under:7.0%} {s.wrong_fit:10.1%}")
    result: dict[str, Any] = {
        "scores": scores,
        "rows": [
            {"name": row.name, "kind": row.kind, "measured_bytes": row.measured_bytes}
            | {name: round(found[i], 5) for name, found in errors.items()}
            for i, row in enumerate(rows)
        ],
    }
    target = ROOT / "benchmarks/results/estimator_accuracy.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(arguments.plot, errors)


if __name__ == "__main__":
    main()
