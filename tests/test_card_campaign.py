"""The program for a machine with a card, on a CPU: it gets through, goes on where it was, and its rows are taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import card_campaign
import estimator_accuracy

from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig, check
from vramplan.units import GIB, MIB


def campaign(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["card_campaign.py", "--out", str(out), *words])
    card_campaign.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_it_gets_through_goes_on_and_its_rows_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "card.jsonl"
    first = campaign(monkeypatch, out, "--dry-run", "--most", "7")
    assert len(first) == 7
    assert {row["workload"] for row in first} >= {"vramplan", "nanogpt"}
    rows = campaign(monkeypatch, out, "--dry-run", "--most", "3")
    assert rows[:7] == first
    assert len({row["key"] for row in rows}) == len(rows) == 10
    for row in rows:
        shape = Shape(**{name: row[name] for name in Shape.__dataclass_fields__})
        assert not check(shape, StepConfig(**{name: row[name] for name in StepConfig.__dataclass_fields__}))
        assert row["outcome"] == "fits"
        assert row["peak_mib"] is row["reserved_gib"] is None, "a CPU has no allocator statistics"
    # as a card would have written them
    for row in rows:
        row |= {"gpu": "RTX 4070", "device": "cuda", "peak_mib": row["estimated_allocated_bytes"] / MIB}
        row |= {"reserved_gib": row["estimated_reserved_bytes"] / GIB}
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    taken = list(estimator_accuracy.measured_rows(tmp_path))
    assert [row.kind for row in taken] == ["allocated", "reserved"] * 10
    assert {row.step.checkpointing for row in taken} == {row["checkpointing"] for row in rows}


def test_every_point_of_the_grid_is_legal_on_a_card() -> None:
    points = list(card_campaign.grid(False))
    assert len({point.key for point in points}) == len(points) > 50
    assert not [point for point in points if check(point.shape, point.step)]
    assert {card_campaign.kernel_of(point, None) for point in points} == {"FLASH_ATTENTION", "EFFICIENT_ATTENTION"}
    under = list(card_campaign.capped(points, None))
    assert {round(point.cap_bytes / 1e9) for point in under if point.cap_bytes} == set(card_campaign.CAPS_GB)
    for point in under:
        assert point.cap_bytes is None or estimate(point.shape, point.step).process_bytes < point.cap_bytes
    plans = list(card_campaign.recommended(find_gpu("H200")))
    assert len({(point.shape, point.cap_bytes) for point in plans}) == len(plans) > 15
    assert 9 < sum(point.step.compile for point in points + plans) <= card_campaign.COMPILED


def test_further_points_are_legal_different_and_always_the_same() -> None:
    points = list(card_campaign.sampled(60, 60 * GIB))
    assert points == list(card_campaign.sampled(60, 60 * GIB))
    assert len({point.key for point in points}) == 60
    assert not [point for point in points if check(point.shape, point.step)]
    assert {point.step.dtype for point in points} == {"bfloat16", "float32", "float16"}
    assert {point.step.workload for point in points} == {"vramplan", "nanogpt", "autocast"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        campaign(monkeypatch, Path("nowhere.jsonl"))
    assert "--dry-run" in capsys.readouterr().err
