"""Write what compiled steps keep from forward to backward into ``vramplan/planner/partitions.json``.

    python benchmarks/trace_partitions.py [only these shapes, or budgets ...]

traces every family under the installed torch, in a quarter of an hour and without a GPU, and puts its version's rows
beside those of others. A row reads: how often, elements as a product of named dimensions, bytes per element, where it
is made. N is tokens, T32 positions rounded up to 32, h the width; other names are those of planner.shape.Shape.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vramplan.memory_probe.partition import DISTINCT_BATCH, as_rows, distinct, partition, saved_tensors
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig

FILE = Path(__file__).parents[1] / "vramplan/planner/partitions.json"

MODERN = {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 4, "qk_norm": True}
SHAPES: dict[str, dict[str, Any]] = {
    "base": {},
    "bias": {"bias": True},
    "untied": {"tied": False},
    "rmsnorm": {"norm": "rmsnorm"},
    "rotary": {"positions": "rotary"},
    "swiglu": {"mlp": "swiglu"},
    "relu2": {"mlp": "relu2"},
    "grouped": {"n_kv_head": 4},
    "qk_norm": {"qk_norm": True},
    "softcap": {"logit_softcap": 30.0},
    "modern": {**MODERN, "logit_softcap": 30.0},
}
SCRIPTS = [{"workload": w} for w in ("nanogpt", "autocast", "plain")] + [{"workload": "plain", "dropout": 0.1}]

BUDGETS = (1.0, 0.5)

Family = tuple[str, str]
Kept = dict[str, tuple[Any, Any]]
"""By version of torch, rows of a layer and rows besides."""


def families() -> list[tuple[str, dict[str, Any]]]:
    """Each shape's name, with the step's settings."""
    ours = [
        (name, {"loss": loss, "checkpointing": checkpointing})
        for name in SHAPES for loss in ("full", "chunked") for checkpointing in ("none", "block")
    ]  # fmt: skip
    scripts = [("base", {**script, "loss": "full"}) for script in SCRIPTS]
    return [(name, {**step, "dtype": dtype}) for name, step in ours + scripts for dtype in ("bfloat16", "float32")]


def budgets() -> list[tuple[str, dict[str, Any]]]:
    """Settings under which activation_memory_budget is traced: a whole model, for it chooses among its layers."""
    return [("budgets", {"n_layer": 12, "loss": loss, "budget": b}) for loss in ("full", "chunked") for b in BUDGETS]


def version() -> str:
    """Of torch, without its patch level."""
    return ".".join(torch.__version__.split(".")[:2])


def main(only: list[str]) -> None:
    found: dict[Family, tuple[Any, Any]] = {}
    for name, settings in families():
        if only and name not in only:
            continue
        shape = Shape(n_layer=1, n_head=12, n_embd=768, **SHAPES[name])
        step = StepConfig(compile=True, **settings)
        kept = partition(shape, step, check=step.half and step.loss == "full" and step.checkpointing == "none")
        found[name, json.dumps(settings)] = kept.layer, kept.outside
        print(name, *settings.values(), flush=True)
    kept_under: dict[Family, Any] = {}
    for name, settings in budgets() if not only or "budgets" in only else ():
        step = StepConfig(compile=True, batch_size=DISTINCT_BATCH, loss=settings["loss"])
        shape = distinct(Shape(n_layer=settings["n_layer"], n_head=12, n_embd=768))
        kept_under[name, json.dumps(settings)] = as_rows(saved_tensors(shape, step, budget=settings["budget"]))
        print(name, *settings.values(), flush=True)
    known = read()
    for family, rows in found.items():
        known.setdefault(family, {})[version()] = rows
    for family, row in kept_under.items():
        known.setdefault(family, {})[version()] = row, ()
    write(known)


def read() -> dict[Family, Kept]:
    """What the file holds."""
    if not FILE.exists():
        return {}
    data = json.loads(FILE.read_text())
    known: dict[Family, Kept] = {}
    for family in data["families"]:
        kept: Kept = {}
        for part in family["kept"]:
            for torch_version in part["torch"]:
                kept[torch_version] = data["rows"][part["layer"]], data["rows"][part["outside"]]
        known[family["name"], json.dumps(family["step"])] = kept
    for under in data.get("budgets", ()):
        rows = {v: (data["rows"][part["rows"]], ()) for part in under["kept"] for v in part["torch"]}
        known["budgets", json.dumps(under["step"])] = rows
    return known


def sizes(rows: Any) -> tuple[tuple[str, int, int], ...]:
    """Rows without their names, which some versions give differently."""
    counts: Counter[tuple[str, int]] = Counter()
    for n, elements, width, _ in rows:
        counts[elements, width] += n
    return tuple(sorted((*size, n) for size, n in counts.items() if n))


def write(known: dict[Family, Kept]) -> None:
    """Every list of rows once, in the order of the families that use them."""
    lists: dict[str, str] = {}

    def named(rows: Any, kind: str) -> str:
        text = json.dumps(rows)
        if text not in lists:
            lists[text] = f"{kind} {1 + sum(name.startswith(kind) for name in lists.values())}"
        return lists[text]

    entries: dict[bool, list[str]] = {False: [], True: []}
    for name, settings in families() + budgets():
        kept, whole = known.get((name, json.dumps(settings)), {}), name == "budgets"
        parts: dict[Any, list[str]] = {}
        for torch_version in sorted(kept, key=lambda v: [int(n) for n in v.split(".")]):
            parts.setdefault(tuple(sizes(rows) for rows in kept[torch_version]), []).append(torch_version)
        rows = []
        for versions in parts.values():
            layer, outside = kept[versions[0]]
            if whole:
                rows.append({"torch": versions, "rows": named(layer, "budget")})
            else:
                rows.append({"torch": versions, "layer": named(layer, "layer"), "outside": named(outside, "outside")})
        what = {} if whole else {"name": name, "shape": SHAPES[name]}
        if rows:
            entries[whole].append(json.dumps({**what, "step": settings, "kept": rows}))
    tables = [
        f"{json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in json.loads(text)) + "\n ]"
        for text, name in lists.items()
    ]
    lines = [",\n ".join(entries[whole]) for whole in (False, True)]
    text = f'{{"families": [\n {lines[0]}\n],\n"budgets": [\n {lines[1]}\n],\n"rows": {{\n ' + ",\n ".join(tables)
    FILE.write_text(text + "\n}}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
