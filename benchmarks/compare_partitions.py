"""Where the table of a compiled step keeps something else than inductor does, by family and version of torch.

    python benchmarks/compare_partitions.py [only these shapes ...]

Compares ``vramplan/planner/partitions.json`` with what is alive at the start of the loss's backward, in bytes: of a
layer and of everything besides, each tensor that only one of the two has. Scalars are left out. Needs no GPU.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

from trace_partitions import SHAPES, read

from vramplan.memory_probe.partition import product
from vramplan.planner.memory import tensor_table
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.tape import unroll

GPT2 = Shape(n_layer=1, n_head=12, n_embd=768)
BATCH = 8
SMALL = 4096
"""Bytes below which a tensor is not worth a line."""


BESIDE_THE_GRAPH = ("gradient of the head", "gradient of the hidden state")
"""The chunked loss makes these in its forward, outside what is compiled."""


def kept_by_table(shape: Shape, step: StepConfig) -> Counter[tuple[int, str]]:
    """Bytes and name of what the forward allocated and the backward finds."""
    living: dict[int, Any] = {}
    for change in unroll(tensor_table(shape, step, evaluation=False)):
        if change.phase == "loss backward":
            break
        if change.alloc:
            living[change.block] = change
        else:
            living.pop(change.block)
    forward = [c for c in living.values() if c.phase in ("forward", "loss forward") and c.row.category != "inputs"]
    kept = [c.row for c in forward if c.row.size >= SMALL and c.row.name not in BESIDE_THE_GRAPH]
    return Counter((int(row.size), row.name) for row in kept)


def traced(rows: Any, shape: Shape, step: StepConfig) -> Counter[tuple[int, str]]:
    """The same of the partition's rows, rounded as the allocator does."""
    kept: Counter[tuple[int, str]] = Counter()
    for n, elements, width, name in rows:
        size = -(-product(elements, shape, step) * width // 512) * 512
        if size >= SMALL:
            kept[size, name] += n
    return kept


def unmatched(table: Counter[tuple[int, str]], trace: Counter[tuple[int, str]]) -> list[tuple[int, str]]:
    """Bytes that the trace has more (or with a minus less), with the names of tensors of that size."""
    lines = []
    sizes = {size for size, _ in (*table, *trace)}
    for size in sorted(sizes, reverse=True):
        ours, theirs = ({name: n for (s, name), n in kept.items() if s == size} for kept in (table, trace))
        n = sum(theirs.values()) - sum(ours.values())
        if n:
            lines.append((n * size, f"traced {theirs or 'none'}, table {ours or 'none'}"))
    return lines


def main(only: list[str]) -> None:
    for (name, settings), kept in read().items():
        if name == "budgets" or (only and name not in only):
            continue
        step = StepConfig(compile=True, batch_size=BATCH, **json.loads(settings))
        shape = replace(GPT2, **SHAPES[name])
        one, two = (kept_by_table(replace(shape, n_layer=n), step) for n in (1, 2))
        layer = Counter({key: two[key] - one[key] for key in two | one if two[key] != one[key]})
        besides = Counter({key: one[key] - layer[key] for key in one | layer if one[key] != layer[key]})
        seen: dict[str, list[str]] = {}
        for version, (rows, others) in kept.items():
            text = ""
            for where, ours, theirs in (("layer", layer, rows), ("besides", besides, others)):
                lines = unmatched(ours, traced(theirs, shape, step))
                tokens = step.batch_size * shape.block_size
                total = sum(size for size, _ in lines) / tokens
                text += f"  {where}: {total:+.1f} bytes per token\n"
                text += "".join(f"    {size / tokens:+10.1f}  {names}\n" for size, names in lines)
            seen.setdefault(text, []).append(version)
        for text, versions in seen.items():
            print(name, settings, "torch", *versions)
            print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
