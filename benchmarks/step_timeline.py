"""Two pictures for docs/memory-model.md: one step's memory over time, and which phase has the peak.

    python benchmarks/step_timeline.py [--out DIR]

Writes step-timeline.svg and winning-phase.svg, the same bytes each time. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vramplan.planner.gpu import budget, find_gpu
from vramplan.planner.memory import estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.timeline import GROUPS, WIDTHS, step_timeline
from vramplan.units import GIB

CARD = "4070"
SHAPE = Shape(n_layer=12, n_head=12, n_embd=768)
BATCH = 8
STEPS = {
    "full loss, eager": StepConfig(loss="full"),
    "chunked loss, eager": StepConfig(),
    "chunked loss, checkpointing": StepConfig(checkpointing="block"),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
VOCABULARIES = tuple(512 * 2**i for i in range(9))
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vramplan",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.facecolor": "white",
}
COLOURS = {  # from the bottom up
    "workspace": "#555555", "weights": "#4477aa", "optimizer": "#66ccee", "gradients": "#228833",
    "activations": "#ccbb44", "logits and loss": "#ee6677", "temporaries": "#aa3377",
}  # fmt: skip
PHASES = {
    "forward": "#66ccee", "loss forward": "#4477aa", "loss backward": "#ee6677", "block backward": "#ccbb44",
    "embedding backward": "#228833", "optimizer step": "#aa3377",
}  # fmt: skip
MOMENTS = 9
"""Drawn for each unit of width."""


def draw_timeline(pyplot: Any, path: Path) -> None:
    card = find_gpu(CARD)
    figure, panels = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True, sharey=True, layout="constrained")
    starts = np.cumsum([0, *WIDTHS.values()])
    for panel, (title, step) in zip(panels, STEPS.items(), strict=False):
        full = estimate(SHAPE, replace(step, batch_size=BATCH), card)
        room = (budget(card).budget_bytes - full.context_bytes) / GIB
        x: list[float] = []
        moments: list[list[float]] = []
        for start, part in zip(starts, step_timeline(full, MOMENTS), strict=False):
            x += [start + part.width * i / len(part.moments) for i in range(len(part.moments))]
            moments += [[size / GIB for size in moment] for moment in part.moments]
        x.append(starts[-1])
        moments.append(moments[-1])
        panel.stackplot(
            x, *zip(*moments, strict=True), colors=[COLOURS[name] for name, _ in GROUPS], step="post", linewidth=0,
            labels=[name for name, _ in GROUPS],
        )  # fmt: skip
        top = max(range(len(moments)), key=lambda i: sum(moments[i]))
        height = sum(moments[top])
        panel.axhline(room, color="black", linestyle="--", linewidth=1)
        panel.text(0.2, room + 0.2, f"what an RTX {CARD} has left beside desktop and CUDA context: {room:.1f} GiB")
        panel.annotate(
            f"peak {height:.2f} GiB, {full.peak_phase}", ((x[top] + x[top + 1]) / 2, height), (0.2, height + 0.5),
            arrowprops={"arrowstyle": "->", "linewidth": 0.8}, fontweight="bold",
        )  # fmt: skip
        for start in starts[1:-1]:
            panel.axvline(start, color="black", linewidth=0.5, alpha=0.4)
        panel.set_title(title, loc="left")
        panel.set(xlim=(0, starts[-1]), ylim=(0, 12.4), ylabel="GiB allocated")
        panel.spines[["top", "right"]].set_visible(False)
    middles = (starts[1:] + starts[:-1]) / 2
    panels[1].set_xticks(middles, [phase.replace(" ", "\n") for phase in PHASES])
    for panel in panels:
        panel.tick_params(axis="x", length=0, labelsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    figure.suptitle(f"One step of a 124M GPT, batch size {BATCH} x {SHAPE.block_size} tokens, bfloat16")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """As SVG without a date and with as many decimals as can be seen."""
    figure.savefig(path, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"(\d\.\d)\d{2,}", r"\1", text), encoding="utf-8")


def draw_phases(pyplot: Any, path: Path) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, panels = pyplot.subplots(1, len(STEPS), figsize=(10, 4.6), sharey=True, layout="constrained")
    names, colours = list(PHASES), ListedColormap(list(PHASES.values()))
    seen = set[str]()
    for panel, (title, step) in zip(panels, STEPS.items(), strict=True):
        cells = []
        for y, vocabulary in enumerate(VOCABULARIES):
            row = [estimate(replace(SHAPE, vocab_size=vocabulary), replace(step, batch_size=b)) for b in BATCHES]
            cells.append([names.index(full.peak_phase) for full in row])
            seen.update(full.peak_phase for full in row)
            for x, full in enumerate(row):
                panel.text(x, y, f"{full.peak_allocated_bytes / GIB:.1f}", ha="center", va="center", fontsize=8)
        panel.imshow(cells, cmap=colours, vmin=0, vmax=len(names) - 1, origin="lower", aspect="auto", alpha=0.75)
        panel.set_xticks(range(len(BATCHES)), [str(b) for b in BATCHES])
        panel.set_yticks(range(len(VOCABULARIES)), [f"{v:,}" for v in VOCABULARIES])
        panel.set(title=title, xlabel=f"batch size x {SHAPE.block_size} tokens")
    panels[0].set_ylabel("vocabulary")
    patches = [Patch(color=colour, alpha=0.75, label=name) for name, colour in PHASES.items() if name in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.suptitle("Phase of the peak, and GiB allocated then: 12 layers, 768 wide, bfloat16")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs", metavar="DIR")
    out: Path = parser.parse_args().out
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        sys.exit("the pictures need matplotlib: pip install matplotlib")
    out.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        draw_timeline(pyplot, out / "step-timeline.svg")
        draw_phases(pyplot, out / "winning-phase.svg")


if __name__ == "__main__":
    main()
