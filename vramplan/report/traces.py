"""What a compiled layer was traced to keep, in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..planner.partitions import Partition, product, rounded
from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..units import MIB, count
from .console import console, printable

SAME = 0.0005
"""Relative difference below which two sums are called the same: a statistic more or less."""


def print_trace(
    torch_version: str, shape: Shape, step: StepConfig, found: Partition, listed_bytes: int, to: Console | None = None
) -> None:
    """Each tensor with its size in this configuration, and the sum beside what the tensor table lists."""
    out = to or console()
    model = f"torch {printable(torch_version)}, {shape.label}, {count(int(shape.parameters))} parameters"
    out.print(f"{model}: what each compiled layer keeps from forward to backward")
    table = Table(box=None, pad_edge=False)
    for name, where in (("made by", "left"), ("elements", "left"), ("bytes each", "right"), ("MiB here", "right")):
        table.add_column(name, justify=where)  # type: ignore[arg-type]
    for n, elements, width, name in found.layer:
        size = n * rounded(product(elements, shape, step) * width) / MIB
        table.add_row(printable(name) + (f" ({n})" if n != 1 else ""), elements, str(width), f"{size:,.2f}")
    out.print(table)
    traced = int(found.layer_bytes(shape, step))
    difference = traced / listed_bytes - 1
    verdict = "the same" if abs(difference) < SAME else f"{abs(difference):.1%} {'less' if difference > 0 else 'more'}"
    out.print(f"Together {traced / MIB:,.2f} MiB; the tensor table lists {listed_bytes / MIB:,.2f} MiB, {verdict}.")
