"""metrics.jsonl: written line by line, read back after a crash, cut back on resume."""

from __future__ import annotations

import json

import pytest

from vramplan.errors import DataError
from vramplan.trainer.metrics import MetricsLog, drop_after, read_metrics


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 6):
            log.append("step", {"step": step, "loss": 1 / step})
    return path


def test_each_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append("step", {"step": 1, "loss": 2.5})
        (line,) = read_metrics(path)
        assert (line["kind"], line["step"], line["loss"]) == ("step", 1, 2.5)
        assert line["time"] > 1.7e9


def test_losses_come_back_exactly(path):
    assert [line["loss"] for line in read_metrics(path)] == [1 / s for s in range(1, 6)]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsLog(tmp_path / "m") as log:
        log.append("step", {"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    (line,) = [json.loads(text) for text in (tmp_path / "m").read_text().splitlines()]
    assert line["loss"] is line["grad_norm"] is None


def test_a_cut_off_last_line_is_left_out(path):
    path.write_bytes(path.read_bytes()[:-20])
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_damage_in_the_middle_is_an_error(path):
    path.write_text(path.read_text().replace('"step": 3', '"step": '))
    with pytest.raises(DataError, match="is damaged in line 3"):
        read_metrics(path)


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]", "3", '{"step": 1}', '{"kind": "step", "step": "one"}', '{"kind": "step", "step": 6}',
        '{"kind": "step", "step": 6, "loss": "low"}', '{"kind": "step", "step": 6, "loss": 1.0, "alloc_retries": []}',
        '{"kind": "evaluation", "step": 6, "val_loss": 2.0}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_a_line_of_another_kind_is_an_error_wherever_it_is(path, line, last):
    good = path.read_text(encoding="utf-8")
    path.write_text(good + line + "\n" + ("" if last else good), encoding="utf-8")
    with pytest.raises(DataError, match=f"is damaged in line {len(good.splitlines()) + 1}: remove that line"):
        read_metrics(path)


def test_a_directory_in_its_place_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path)


def test_no_file_means_no_lines(tmp_path):
    assert read_metrics(tmp_path / "none") == []
    assert drop_after(tmp_path / "none", 3) == 0


def test_lines_beyond_a_step_are_dropped_and_the_rest_kept(path):
    before = read_metrics(path)
    path.write_bytes(path.read_bytes() + b'{"kind": "st')
    assert drop_after(path, 3) == 2
    assert read_metrics(path) == before[:3]
    with MetricsLog(path) as log:
        log.append("step", {"step": 4, "loss": 0.25})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]
