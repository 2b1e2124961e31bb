"""The report as a file: complete, equal to its JSON, self-contained, and safe with names from elsewhere."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vramplan.cli import main
from vramplan.planner.card_memory import card_memory
from vramplan.planner.evidence import Evidence, Residual
from vramplan.planner.gpu import budget, find_gpu
from vramplan.planner.memory import STEP_PARTS, estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.timeline import GROUPS, WIDTHS, WITHIN, step_timeline
from vramplan.planner.ways import ways
from vramplan.report.charts import timeline_chart
from vramplan.report.html import render_report
from vramplan.report.risk import RiskReport, build_report
from vramplan.units import GIB, gib

CARD = find_gpu("4070")
BUDGET = budget(CARD).budget_bytes
SHAPE = Shape(n_layer=12, n_head=12, n_embd=768)
STEP = StepConfig(batch_size=16, grad_accum=32, compile=True, loss="full")
LARGEST_FILE = 1_500_000
SPLIT = {"batch_size": 8, "grad_accum": 64}


class Reader(HTMLParser):
    """Tags that are opened and closed, addresses, and the words of the page."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.values: dict[str, str] = {}
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.addresses += [str(found[name]) for name in ("href", "src", "xlink:href", "data") if found.get(name)]
        if "data-value" in found:
            self.values[str(found["data-value"])] = str(found["data-exact"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(step: StepConfig = STEP, card: Any = CARD, budget_bytes: int = BUDGET, **more: Any) -> RiskReport:
    return build_report("plan.json: 12L/12H/768E", SHAPE, step, card, budget_bytes, 0.01, **more)


@pytest.fixture(scope="module")
def made() -> RiskReport:
    return report(total_bytes=CARD.usable_bytes)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], prog_name="vramplan")


def test_the_page_is_well_formed_small_and_loads_nothing(made: RiskReport) -> None:
    text = render_report(made)
    read = Reader(text)
    assert read.open == []
    assert len(text.encode()) < LARGEST_FILE
    assert [a for a in read.addresses if not a.startswith(("#", "data:"))] == []
    assert not re.search(r"url\((?!data:)|@import|<script", text)
    assert {"main", "h1", "h2", "table", "caption", "figure", "figcaption", "details", "footer"} <= set(read.tags)
    assert text.count('role="img" aria-label=') >= 3  # both charts and the card's bar
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_its_figures_are_those_of_the_json(made: RiskReport) -> None:
    values, found = Reader(render_report(made)).values, made.as_dict()
    for name in ("budget_bytes", "headroom_bytes", "oom_risk", "needs_bytes", "tokens_per_second"):
        assert float(values[name]) == found[name]
    assert int(values["process_bytes"]) == found["estimate"]["process_bytes"]


def test_every_part_of_the_report_is_there(made: RiskReport) -> None:
    words = " ".join(" ".join(Reader(render_report(made)).words).split())
    for part in (
        made.verdict, "loss backward", "gradient of the logits", "11.99 GiB on the box", "CUDA context", "kept back",
        "90 % interval", "Pareto front", "chunked loss", "largest batch", "8-bit AdamW states *",
    ):  # fmt: skip
        assert part in words
    for way in made.ways:
        assert f"{way.tokens_per_second:,.0f}" in words


def test_words_from_elsewhere_cannot_become_markup() -> None:
    made = build_report(
        "<script>alert(1)</script>\x1b[31m", SHAPE, STEP, CARD, BUDGET, 0.01,
        {"steps": 3, "guard": [{"step": 1, "reason": "<img src=x onerror=alert(1)>"} | SPLIT]},
        total_bytes=10 * GIB, held=[("</td><b>python", GIB)],
    )  # fmt: skip
    text = render_report(made)
    assert "<script>" not in text
    assert "<img" not in text
    assert "</td><b>" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;" in text


def test_a_configuration_that_does_not_fit_says_what_would(made: RiskReport) -> None:
    tight = report(budget_bytes=6 * GIB)
    assert "does not fit" in tight.verdict
    assert tight.repair is not None
    text = render_report(tight)
    assert 'class="verdict no"' in text
    assert "Smallest change that fits" in text
    assert "missing" in text
    assert "Smallest change" not in render_report(made)


def test_without_a_card_there_is_no_speed_and_no_picture_of_it() -> None:
    text = render_report(report(card=None))
    assert "n/a" in text
    assert "memory-and-speed" not in text
    assert "memory-timeline" in text


def test_measurements_of_the_card_are_listed_beside_their_estimates() -> None:
    known = (
        Residual("vramplan", "compiled", 0.02, 5 * GIB),
        Residual("vramplan", "compiled", 0.1, 6 * GIB, at_least=True),
    )
    other = Residual("vramplan", "eager", 0.5, 5 * GIB)
    made = report(card=replace(CARD, evidence=Evidence((*known, other))))
    words = " ".join(Reader(render_report(made)).words)
    assert "5.10 GiB" in words
    assert "at least 6.60 GiB" in " ".join(words.split())
    assert "7.50 GiB" not in words
    assert [entry["measured_bytes"] for entry in made.as_dict()["evidence"]] == [round(5.1 * GIB), round(6.6 * GIB)]


def test_what_a_run_measured_stands_beside_what_was_expected(made: RiskReport) -> None:
    peaks = {"forward": 7 * GIB, "backward": 10 * GIB, "somewhere": GIB}
    measured = {
        "steps": 50, "peak_allocated_bytes": 10 * GIB, "alloc_retries": 2, "phase_peaks": peaks,
        "guard": [{"step": 9, "reason": "batch_size 16 -> 8", "batch_size": 8, "grad_accum": 64}],
    }  # fmt: skip
    text = " ".join(Reader(render_report(report(measured=measured))).words)
    expected = made.estimate.peak_allocated_bytes / (10 * GIB) - 1  # the peak is in the backward
    assert f"{expected * 100:+.2f} %" in text
    for words in ("tried again 2 times", "step 9: batch_size 16 -> 8", "somewhere"):
        assert words in text


# -------------------------------------------------------------------- its data


def test_the_timeline_reaches_the_peak_and_keeps_the_order_of_phases() -> None:
    full = estimate(SHAPE, STEP, CARD)
    found = step_timeline(full)
    assert [stretch.phase for stretch in found] == list(WIDTHS)
    assert max(sum(stretch.top) for stretch in found) == full.peak_table_bytes
    assert max(found, key=lambda stretch: sum(stretch.top)).phase == full.peak_phase
    for stretch in found:
        assert sum(stretch.top) == full.phase_peaks[stretch.phase] or sum(stretch.top) < full.peak_table_bytes
    names = [name for name, _ in GROUPS]
    weights = found[0].moments[0][names.index("weights")]
    assert weights == 4 * SHAPE.parameters


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("compiled", [True, False])
def test_every_phase_of_a_step_is_drawn_once_and_belongs_to_one_part(checkpointing: Any, compiled: bool) -> None:
    full = estimate(SHAPE, replace(STEP, checkpointing=checkpointing, compile=compiled), CARD)
    phases = set(full.phase_peaks) - {"persistent", "evaluation", "checkpoint save"}
    assert ("block recompute" in phases) is (checkpointing == "block")
    parts = [phase for part in STEP_PARTS.values() for phase in part]
    assert len(set(parts)) == len(parts)
    assert phases <= set(parts)
    tops = {stretch.phase: sum(stretch.top) for stretch in step_timeline(full)}
    assert {WITHIN.get(phase, phase) for phase in phases} == set(tops) == set(WIDTHS)
    for drawn, top in tops.items():
        # a phase's own peak counts the moment before its first event as well
        assert top <= max(full.phase_peaks[phase] for phase in phases if WITHIN.get(phase, phase) == drawn)
    assert max(tops.values()) == full.peak_table_bytes


def test_what_is_allocated_beside_the_drawn_tensors_is_said(made: RiskReport) -> None:
    full = made.estimate
    assert made.drawn_peak_bytes == full.peak_table_bytes
    words = made.beside_the_tensors
    assert f"{gib(full.first_step_bytes)} for tuning kernels" in words
    assert f"{gib(full.peak_allocated_bytes - full.peak_table_bytes - full.first_step_bytes)} in blocks" in words
    assert words in " ".join(" ".join(Reader(render_report(made)).words).split())


def test_a_run_that_was_measured_says_so_beside_the_verdict() -> None:
    measured = {
        "steps": 9, "peak_allocated_bytes": 9 * GIB, "peak_reserved_bytes": 10 * GIB,
        "guard": [{"step": 4, "reason": "x", "batch_size": 8, "grad_accum": 64}],
    }  # fmt: skip
    words = report(measured=measured).run_sentence
    assert "10.00 GiB at the most, 9.00 GiB of it allocated" in words
    assert "since step 4 it runs as 8 x 64" in words
    assert report().run_sentence == ""


def test_the_parts_of_a_card_add_up_to_it() -> None:
    full = estimate(SHAPE, STEP, CARD)
    parts = card_memory(CARD, BUDGET + GIB // 2, BUDGET, full, [("game", GIB // 8), ("shell", None)])
    assert sum(part.n_bytes for part in parts) == CARD.total_bytes
    by_name = {part.name: part for part in parts}
    assert by_name["game"].n_bytes == GIB // 8
    assert "shell" in by_name["other programs"].note
    assert by_name["kept back"].n_bytes == GIB // 2
    tight = card_memory(CARD, 6 * GIB, 6 * GIB, full)
    missing = next(part for part in tight if part.kind == "missing")
    assert sum(part.n_bytes for part in tight if part.kind != "missing") - missing.n_bytes == CARD.total_bytes


def test_no_way_on_the_front_is_beaten_and_every_other_is() -> None:
    found = ways(estimate(SHAPE, STEP, CARD), CARD, BUDGET, 0.01)
    assert found[0].changes == ()
    assert found[0].step == STEP
    assert len({way.step for way in found}) == len(found)
    plain = [way for way in found if not way.changes_result]
    for way in plain:
        beaten = any(
            other.process_bytes <= way.process_bytes and other.tokens_per_second >= way.tokens_per_second
            and (other.process_bytes, other.tokens_per_second) != (way.process_bytes, way.tokens_per_second)
            for other in plain
        )  # fmt: skip
        assert way.on_front is not beaten
    assert all(not way.on_front for way in found if way.changes_result)
    assert {way.step.optimizer for way in found if way.changes_result} == {"adamw8bit"}
    sequences = {way.step.batch_size * way.step.grad_accum for way in found}
    assert sequences == {512}


def test_a_chart_leaves_the_imports_of_others_alone(made: RiskReport) -> None:
    timeline_chart(made)
    assert not [finder for finder in sys.meta_path if not hasattr(finder, "find_spec")]


def test_a_chart_has_neither_date_nor_link(made: RiskReport) -> None:
    picture = timeline_chart(made)
    assert picture == timeline_chart(made)
    assert "http" not in picture.replace("http://www.w3.org/", "")
    assert "<!--" not in picture


# -------------------------------------------------------------------- the command


def test_the_command_writes_the_file_and_says_the_verdict(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert run("plan", "--gpu", "4070", "--params", "30M", "-o", plan).exit_code == 0
    done = run("report", plan, "--html", tmp_path / "report.html")
    assert done.exit_code == 0, done.output
    assert "It fits" in done.output
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    answer = json.loads(run("report", plan, "--json").stdout)
    assert int(page.values["process_bytes"]) == answer["estimate"]["process_bytes"]
    assert sum(part["bytes"] for part in answer["card"]) == CARD.total_bytes
    over = run("report", plan, "--html", plan)
    assert over.exit_code == 2
    assert "is what it is made from" in over.stderr
    assert "plans" in json.loads(plan.read_text(encoding="utf-8"))
    beyond = run("report", plan, "--vram", "64GiB")
    assert "is more than the RTX 4070 has" in " ".join(beyond.output.split())
    denied = run("report", plan, "--html", tmp_path)
    assert denied.exit_code == 2
    assert "--html" in denied.stderr
