"""The autotuner's progress and result in the terminal, and the picture of its trials."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..files import write_text
from ..memory_probe.tuner import Arm, Trial, Tuned
from ..units import count
from .console import console

SHOWN = 8
"""Arms in the table at the end."""


def arm_words(arm: Arm) -> str:
    """An arm in a line."""
    p = arm.params
    words = [
        p["shape"], f"batch {arm.step.batch_size} x {arm.step.grad_accum}", "compiled" if p["compile"] else "eager",
        f"{p['loss']} loss", f"checkpointing {p['checkpointing']}", p["optimizer"],
    ]  # fmt: skip
    return ", ".join([*map(str, words), *([arm.alloc_conf] if arm.alloc_conf else [])])


def progress_line(trial: Trial, best: Trial | None) -> str:
    """One trial as it ends, with the best so far."""
    result = trial.result
    how = (
        f"{count(result.tokens_per_second)} tokens/s" if result.tokens_per_second else result.outcome.replace("_", " ")
    )
    top = f"   best {count(best.result.tokens_per_second)}" if best and best.result.tokens_per_second else ""
    return f"{trial.number:4d}  {how:>18}{top}   {arm_words(trial.arm)}"


def print_tuned(tuned: Tuned, study: str, again: str, to: Console | None = None) -> None:
    """The winner, how the planner's order compares with the measured one, and how the study goes on."""
    out = to or console()
    measured = ranked(tuned)
    out.print(f"{tuned.probes} of {tuned.arms} arms measured; stopped: {tuned.stopped}.")
    if tuned.best is None:
        out.print("[red]No arm fits.[/red] The least that memory was missed by is in the list above.")
        return
    out.print(f"[bold]Best: {escape(arm_words(tuned.best.arm))}[/bold]")
    table = Table(box=None, pad_edge=False)
    for name, where in (("measured", "right"), ("planner", "right"), ("tokens/s", "right"), ("arm", "left")):
        table.add_column(name, justify=where)  # type: ignore[arg-type]
    places = planner_places(measured)
    for number, trial in enumerate(measured[:SHOWN], 1):
        rate = count(trial.result.tokens_per_second or 0)
        table.add_row(str(number), str(places[trial.number]), rate, escape(arm_words(trial.arm)))
    out.print(table)
    agreement = rank_correlation(measured)
    if agreement is not None:
        out.print(
            f"Planner's order against the measured one: rank correlation {agreement:+.2f} of {len(measured)} arms."
        )
    out.print(f"The study is {escape(study)}; go on with it: {escape(again)}")


def ranked(tuned: Tuned) -> list[Trial]:
    """Trials that ran to their end, fastest first."""
    running = [t for t in tuned.trials if t.result.tokens_per_second]
    return sorted(running, key=lambda t: -t.result.value)


def planner_places(trials: list[Trial]) -> dict[int, int]:
    """The planner's place of each of these trials among them, by trial number."""
    order = sorted(trials, key=lambda t: t.arm.rank)
    return {trial.number: place for place, trial in enumerate(order, 1)}


def rank_correlation(trials: list[Trial]) -> float | None:
    """Spearman's between the planner's order and the given one; None for fewer than three."""
    n = len(trials)
    if n < 3:
        return None
    places = planner_places(trials)
    apart = sum((place - places[trial.number]) ** 2 for place, trial in enumerate(trials, 1))
    return 1 - 6 * apart / (n * (n * n - 1))


def as_dict(tuned: Tuned, study: str) -> dict[str, object]:
    """What ``tune --json`` prints."""
    return {
        "study": study, "arms": tuned.arms, "probes": tuned.probes, "stopped": tuned.stopped,
        "best": _trial_dict(tuned.best) if tuned.best else None, "trials": [_trial_dict(t) for t in tuned.trials],
        "rank_correlation": rank_correlation(ranked(tuned)),
    }  # fmt: skip


def _trial_dict(trial: Trial) -> dict[str, object]:
    result = {name: getattr(trial.result, name) for name in trial.result.__dataclass_fields__}
    return {"number": trial.number, "planner_rank": trial.arm.rank, "params": trial.arm.params, **result}


# ---------------------------------------------------------------- the picture

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 320, 64, 40, 16


def save_plot(tuned: Tuned, path: Path) -> None:
    """Draw tokens/s over the trials with the best so far, as SVG. Raises ConfigError when it cannot be written."""
    write_text(path, plot(tuned), "--plot")


def plot(tuned: Tuned) -> str:
    """The picture: a dot for each arm that ran, a cross for one that did not fit, a line for the best so far."""
    trials = [t for t in tuned.trials if t.result.outcome != "estimate"]
    top = max((t.result.tokens_per_second or 0.0 for t in trials), default=1.0) * 1.08 or 1.0
    step = (WIDTH - LEFT - 16) / max(1, len(trials))

    def x(i: float) -> float:
        return LEFT + (i + 0.5) * step

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - rate / top * (HEIGHT - BOTTOM - TOP)

    parts, best, line = [], 0.0, []
    for i, trial in enumerate(trials):
        rate = trial.result.tokens_per_second
        words = f"<title>{_xml(progress_line(trial, None).strip())}</title>"
        if rate:
            parts.append(f'<circle cx="{x(i):.1f}" cy="{y(rate):.1f}" r="4" class="arm">{words}</circle>')
        else:
            parts.append(f'<text x="{x(i):.1f}" y="{y(0) - 4:.1f}" class="miss">x{words}</text>')
        best = max(best, rate or 0.0)
        line.append(f"{x(i):.1f},{y(best):.1f}")
    ticks = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - 16}" y1="{y(v):.1f}" y2="{y(v):.1f}" class="grid"/>'
        f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" class="tick">{count(v) if v else 0}</text>'
        for v in (top * k / 4 for k in range(5))
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" \
aria-label="tokens per second of each measured arm">
<style>
svg {{ font: 12px sans-serif; background: #fff; color: #222 }} .arm {{ fill: #2a6fbb }} .miss {{ fill: #b3261e }}
.best {{ fill: none; stroke: #d98200; stroke-width: 2 }} .grid {{ stroke: #ddd }}
.tick {{ text-anchor: end; fill: #555 }} .axis {{ text-anchor: middle; fill: #555 }} .miss {{ text-anchor: middle }}
@media (prefers-color-scheme: dark) {{ svg {{ background: #181a1b }} .grid {{ stroke: #3a3d40 }}
.tick, .axis {{ fill: #bbb }} .arm {{ fill: #7db4ee }} .miss {{ fill: #ff8a80 }} }}
</style>
{ticks}
<polyline points="{" ".join(line)}" class="best"/>
{"".join(parts)}
<text x="{WIDTH / 2}" y="{HEIGHT - 10}" class="axis">arms in the order measured; the line is the best so far</text>
<text x="14" y="{HEIGHT / 2}" class="axis" transform="rotate(-90 14 {HEIGHT / 2})">tokens/s</text>
</svg>
"""


def _xml(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
