"""A stated risk is kept by real measurements that it was not derived from: each configuration left out in turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from vramplan.memory_probe.ledger import Ledger
from vramplan.memory_probe.measurement import Measurement
from vramplan.planner.evidence import NEAR, Evidence, Residual
from vramplan.planner.gpu import find_gpu
from vramplan.planner.memory import estimate
from vramplan.planner.plan_file import SHAPE_FIELDS
from vramplan.planner.risk import ENOUGH, needed_bytes, oom_risk
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.units import MIB

DATA = Path(__file__).parent.parent / "data"
PROBES = DATA / "ledger" / "cpu.jsonl"
"""``ledger export`` of probes of random configurations on a CPU."""


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    with Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite") as ledger:
        imported = ledger.import_lines(PROBES.read_text(encoding="utf-8").splitlines())
        assert imported.refused == ()
        return ledger.evidence("cpu")


def test_every_recorded_probe_ended_well_and_met_the_estimate() -> None:
    found = [Measurement.read(line) for line in PROBES.read_text(encoding="utf-8").splitlines()]
    assert len({m.configuration for m in found}) >= 40
    assert {m.outcome for m in found} == {"fits"}
    assert max(abs(m.allocated_error or 0.0) for m in found) < 0.0005


def card_rows() -> list[Residual]:
    """The measured rows of an RTX 3060, allocated bytes."""
    found = []
    for line in (DATA / "measured" / "rtx3060.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["peak_mib"] is None:
            continue
        shape = Shape(**{name: row[name] for name in SHAPE_FIELDS if name in row})
        fields = ("batch_size", "grad_accum", "dtype", "compile", "loss", "optimizer", "workload")
        full = estimate(shape, StepConfig(**{name: row[name] for name in fields}), find_gpu(row["gpu"]))
        expected = full.peak_allocated_bytes
        found.append(Residual("autocast", "eager", row["peak_mib"] * MIB / expected - 1, expected))
    return found


def exceeded(rows: Sequence[Residual], limit: float) -> int:
    """How many rows need more than the others, as evidence, say is enough for this limit."""
    count = 0
    for i, row in enumerate(rows):
        others = Evidence((*rows[:i], *rows[i + 1 :]))
        step = StepConfig(workload=row.workload, loss="full")  # type: ignore[arg-type]
        need = needed_bytes(row.expected_bytes, step, limit, others)
        count += row.expected_bytes * (1 + row.error) > need
    return count


@pytest.mark.parametrize("limit", [0.2, 0.1, 0.05, 0.02])
def test_probes_on_a_cpu_keep_the_limit_without_any_assumption(probed: Evidence, limit: float) -> None:
    rows = [r for r in probed.residuals if r.mode == "eager"]
    rows = [Residual(r.workload, r.mode, r.error, 1) for r in rows]  # of one size: every row speaks for every other
    assert len(rows) > ENOUGH
    assert exceeded(rows, limit) <= limit * len(rows)


@pytest.mark.parametrize("limit", [0.2, 0.05, 0.01])
def test_the_cards_rows_keep_the_limit(limit: float) -> None:
    rows = card_rows()
    assert len(rows) >= 6
    assert exceeded(rows, limit) <= limit * len(rows)


def test_so_much_evidence_leaves_a_narrow_margin_and_says_what_it_rests_on(probed: Evidence) -> None:
    step = StepConfig(dtype="float32", device="cpu")
    size = sorted(r.expected_bytes for r in probed.residuals)[20] * int(NEAR)  # all but twenty speak for it
    assert needed_bytes(size, step, 0.01, probed) < 1.002 * size
    risk = oom_risk(size, int(1.005 * size), step, probed)
    assert (risk.measurements > ENOUGH, risk.probability <= 0.01) == (True, True)
    assert "no distribution is assumed" in risk.reason
