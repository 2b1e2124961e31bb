"""What inductor's partition keeps, traced under the installed torch, against the rows that are shipped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import vramplan.planner
from vramplan.memory_probe.partition import DISTINCT_BATCH, distinct, partition, saved_tensors, symbolic
from vramplan.planner.partitions import product
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig

FILE = Path(vramplan.planner.__file__).with_name("partitions.json")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
VERSION = ".".join(torch.__version__.split(".")[:2])
GPT2 = Shape(n_layer=1, n_head=12, n_embd=768)


def shipped(name: str, settings: dict[str, Any]) -> tuple[Shape, list[Any], list[Any]]:
    """The family's shape, and its rows of a layer and besides for the installed torch."""
    data = json.loads(FILE.read_text())
    (family,) = (f for f in data["families"] if f["name"] == name and f["step"] == settings)
    for kept in family["kept"]:
        if VERSION in kept["torch"]:
            shape = Shape(n_layer=1, n_head=12, n_embd=768, **family["shape"])
            return shape, data["rows"][kept["layer"]], data["rows"][kept["outside"]]
    pytest.skip(f"torch {VERSION} was not traced")


def sizes(rows: Any) -> Counter[tuple[str, int]]:
    """Rows without their names."""
    counts: Counter[tuple[str, int]] = Counter()
    for n, elements, width, _ in rows:
        counts[elements, width] += n
    return Counter({size: n for size, n in counts.items() if n})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("base", {"loss": "full", "checkpointing": "none", "dtype": "bfloat16"}),
        ("modern", {"loss": "chunked", "checkpointing": "none", "dtype": "bfloat16"}),
        ("base", {"loss": "chunked", "checkpointing": "block", "dtype": "float32"}),
        ("base", {"workload": "plain", "dropout": 0.1, "loss": "full", "dtype": "bfloat16"}),
    ],
)
def test_the_shipped_rows_are_what_the_installed_torch_keeps(name: str, settings: dict[str, Any]) -> None:
    """One of the four is traced with a third layer as well, which must keep what the second does."""
    shape, layer, outside = shipped(name, settings)
    traced = partition(shape, StepConfig(compile=True, **settings), check="checkpointing" not in settings)
    assert sizes(traced.layer) == sizes(layer)
    assert sizes(traced.outside) == sizes(outside)


def test_a_smaller_budget_keeps_less() -> None:
    shape, step = distinct(GPT2), StepConfig(compile=True, batch_size=DISTINCT_BATCH)

    def kept(budget: float) -> int:
        counts = saved_tensors(shape, step, budget=budget)
        return sum(n * product(saved.elements, shape, step) * saved.width for saved, n in counts.items())

    assert kept(0.5) < 0.6 * kept(1.0)


def test_a_size_is_named_by_its_only_factorisation() -> None:
    shape, step = distinct(GPT2), StepConfig(batch_size=DISTINCT_BATCH)
    for name in ("N h", "N qkv", "N mlp", "h mlp", "h V", "N", "T h", "N n_head", "B n_head T32", "2"):
        assert symbolic(product(name, shape, step), shape, step) == name
    with pytest.raises(ValueError, match="no product"):
        symbolic(product("N h", shape, step) + 1, shape, step)
