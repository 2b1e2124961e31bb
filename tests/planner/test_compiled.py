"""The compiled table keeps from forward to backward what inductor's partition was traced to keep (partitions.json)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vramplan.planner
from vramplan.memory_probe.partition import partition
from vramplan.planner.compiled import TRACED_TORCH
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate, first_step_bytes, tensor_table
from vramplan.planner.partitions import product
from vramplan.planner.risk import risk_of
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.tape import unroll
from vramplan.units import MIB

DATA = json.loads(Path(vramplan.planner.__file__).with_name("partitions.json").read_text(encoding="utf-8"))
GPT2 = Shape(n_layer=12, n_head=12, n_embd=768)
OUTSIDE_THE_GRAPH = ("gradient of the head", "gradient of the hidden state")
"""The chunked loss forms these in its forward."""


def families() -> list[Any]:
    """Every traced family without checkpointing, for each group of releases that keep the same."""
    found = []
    for family in DATA["families"]:
        if family["step"].get("checkpointing", "none") == "none" and family["name"] != "budgets":
            for kept in family["kept"]:
                name = f"{family['name']}, {family['step']}, torch {kept['torch']}"
                found.append(pytest.param(family, DATA["rows"][kept["layer"]], id=name))
    return found


def kept_by_the_table(shape: Shape, step: StepConfig) -> Counter[int]:
    """Sizes of what the forward allocated and the backward finds."""
    living: dict[int, Any] = {}
    for change in unroll(tensor_table(shape, step, evaluation=False)):
        if change.phase == "loss backward":
            break
        if change.alloc:
            living[change.block] = change
        else:
            living.pop(change.block)
    rows = [c.row for c in living.values() if c.phase in ("forward", "loss forward") and c.row.category != "inputs"]
    return Counter(int(row.size) for row in rows if row.name not in OUTSIDE_THE_GRAPH)


def per_layer(rows: Any, shape: Shape, step: StepConfig) -> Counter[int]:
    """Sizes of traced rows, rounded as the allocator does."""
    traced: Counter[int] = Counter()
    for n, elements, width, _ in rows:
        traced[-(-product(elements, shape, step) * width // 512) * 512] += n
    return traced


@pytest.mark.parametrize(("family", "rows"), families())
def test_a_layer_keeps_what_was_traced(family: dict[str, Any], rows: Any) -> None:
    """To the tensor in bfloat16. In float32 inductor keeps one statistic of a LayerNorm, not two; and with grouped and
    normalised heads it keeps these instead of the projection that they are made of."""
    step = StepConfig(compile=True, batch_size=8, **family["step"])
    shape = replace(GPT2, n_layer=1, **family["shape"])
    more, one = (kept_by_the_table(replace(shape, n_layer=n), step) for n in (2, 1))
    table = Counter({size: more[size] - one[size] for size in more | one if more[size] != one[size]})
    traced = per_layer(rows, shape, step)
    if step.dtype == "bfloat16" and step.workload in ("vramplan", "plain"):
        small = 4096
        assert {k: n for k, n in table.items() if k > small} == {k: n for k, n in traced.items() if k > small}
        return
    total, real = (sum(size * n for size, n in kept.items()) for kept in (table, traced))
    assert total == pytest.approx(real, rel=0.03 if family["name"] == "modern" else 5e-4)


def test_selective_checkpointing_keeps_what_is_traced_now() -> None:
    """To the tensor, under the installed torch."""
    step = StepConfig(compile=True, batch_size=8, checkpointing="selective", loss="chunked")
    more, one = (kept_by_the_table(replace(GPT2, n_layer=n), step) for n in (2, 1))
    table = {size: more[size] - one[size] for size in more if more[size] != one[size]}
    assert table == per_layer(partition(GPT2, step, check=False).layer, GPT2, step)


def test_the_releases_are_those_that_were_traced() -> None:
    traced = {version for family in DATA["families"] for kept in family["kept"] for version in kept["torch"]}
    assert traced == {".".join(map(str, version)) for version in TRACED_TORCH}


@pytest.mark.parametrize("version", ["2.10", "2.12", "2.14", "2.16", "3.0.1"])
def test_a_release_that_was_not_traced_is_said_to_be_outside_with_a_wider_risk(version: str) -> None:
    step, card = StepConfig(batch_size=8, compile=True), find_gpu("4070")
    known, unknown = (estimate(GPT2, replace(step, torch=torch), card) for torch in ("2.13", version))
    assert not known.caveats
    assert "not traced" in unknown.caveats[0]
    budget = int(1.1 * known.process_bytes)
    assert risk_of(unknown, budget).probability > 100 * risk_of(known, budget).probability


@pytest.mark.parametrize(("version", "words"), [("2.10", "2.11 to 2.15"), ("2.12", ""), ("9.9", "2.11 to 2.15")])
def test_an_unknown_release_is_outside_in_eager_mode_too(version: str, words: str) -> None:
    caveats = estimate(GPT2, StepConfig(batch_size=8, torch=version), find_gpu("4070")).caveats
    assert words in " ".join(caveats)
    assert bool(caveats) is bool(words)


def test_a_compiled_gated_mlp_that_is_recomputed_is_said_to_be_outside() -> None:
    gated, block = replace(GPT2, mlp="swiglu"), StepConfig(checkpointing="block")
    assert "gated MLP" in estimate(gated, replace(block, compile=True)).caveats[0]
    assert not estimate(gated, block).caveats
    assert not estimate(gated, StepConfig(compile=True)).caveats


@pytest.mark.parametrize(
    ("card", "shape", "step", "words"),
    [
        ("4070", {"n_embd": 504}, {"dtype": "float32"}, "no float32 heads of 42"),
        ("4070", {"n_embd": 516, "n_head": 12}, {"dtype": "tf32"}, "no float32 heads of 43"),
        ("t4", {"n_kv_head": 4}, {"dtype": "float16"}, "before Ampere"),
        ("t4", {"n_embd": 720}, {"dtype": "float16"}, "before Ampere"),
        ("t4", {}, {"dtype": "float16"}, "before Ampere"),
        ("4070", {"n_head": 4, "n_embd": 832}, {}, "does not train bfloat16 heads of 208"),
        ("4070", {"n_head": 4, "n_embd": 832, "n_kv_head": 2}, {}, "memory-efficient kernel"),
        ("4070", {"n_head": 4, "n_embd": 1024}, {"dropout": 0.1, "workload": "plain", "loss": "full"}, "heads of 256"),
    ],
)
def test_where_no_fused_attention_applies_it_is_said(card: str, shape: Any, step: Any, words: str) -> None:
    outside = estimate(replace(GPT2, **shape), StepConfig(batch_size=8, **step), find_gpu(card))
    assert words in outside.caveats[0]
    other = estimate(replace(GPT2, **shape), StepConfig(batch_size=8), find_gpu("A100 80GB"))
    assert not other.caveats, "half precision on Ampere pads, and groups"


# ------------------------------------------------------------------- the first step


def test_tuning_takes_a_buffer_as_large_as_the_cache_beside_the_peak() -> None:
    step, card = StepConfig(batch_size=8, compile=True, loss="full"), find_gpu("4070")
    assert first_step_bytes(step, card) == 46 * MIB
    assert first_step_bytes(replace(step, torch="2.6"), card) == 256 * MIB
    assert first_step_bytes(replace(step, compile=False), card) == 0
    e = estimate(GPT2, step, card)
    assert e.breakdown["first step"] == 46 * MIB
    assert e.peak_allocated_bytes >= e.peak_table_bytes + 46 * MIB


def test_a_vocabulary_that_needs_padding_is_padded_where_the_logits_leave_the_graph() -> None:
    step = StepConfig(batch_size=8, compile=True, loss="full", workload="plain")
    names = [{c.row.name for c in estimate(replace(GPT2, vocab_size=v), step).changes} for v in (50257, 50264)]
    assert "logits, padded" in names[0] - names[1]
    odd, even = (estimate(replace(GPT2, vocab_size=v), step).peak_reserved_bytes for v in (50257, 50264))
    assert odd > even
