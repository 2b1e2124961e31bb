"""Does the tuner find what trying everything finds? On the CPU at hand, with real probes.

    python benchmarks/tuner_against_exhaustive.py [--record tests/data/tuner_timings.json]

Every arm of a small model is probed, in random order; then the tuner may probe a third of them, anew. Its winner and
the exhaustive best run in turn, in one process, 30 pairs of steps: their ratio is the answer. The recorded rates of
the exhaustive pass are what the tests replay.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vramplan.memory_probe.arms import TIMED_SECONDS, Space
from vramplan.memory_probe.cpu import random_batches, trainer
from vramplan.memory_probe.probe import probe
from vramplan.memory_probe.study import open_study
from vramplan.memory_probe.tuner import Arm, Result, tune
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig

SPACE = Space(
    shapes=(Shape(n_layer=3, n_head=4, n_embd=128, vocab_size=4096, block_size=128),),
    step=StepConfig(batch_size=8, dtype="float32", device="cpu"), gpu=None, budget_bytes=2**34,
)  # fmt: skip
PAIRS, WARM_UP, SEED = 30, 3, 20261121


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write the rates of every arm to this file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tuner_against_exhaustive.json")
    options = parser.parse_args()
    measure = SPACE.measured_by(
        lambda arm: probe(arm.shape, arm.step, steps=5, timed_seconds=TIMED_SECONDS), lambda found: None
    )
    arms = SPACE.arms()
    rates = exhaustive(arms, measure)
    if options.record:
        rows = [{"params": arm.params, "score": rates[arm.key]} for arm in arms]
        options.record.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    best = max(arms, key=lambda arm: rates[arm.key] or 0.0)
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(f"sqlite:///{folder}/study.sqlite", "benchmark", SEED)
        tuned = tune(study, arms, measure, ruled_out=SPACE.ruled_out, trials=len(arms) // 3, patience=len(arms))
    if tuned.best is None:
        raise SystemExit("no arm ran")
    ratios = paired(tuned.best.arm, best)
    result = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "arms": len(arms), "probes": tuned.probes,
        "stopped": tuned.stopped, "winner": tuned.best.arm.params, "exhaustive_best": best.params,
        "winner_over_best": statistics.median(ratios), "pairs": len(ratios),
        "ratios_from_to": [min(ratios), max(ratios)], "recorded_winner_over_best": rates[tuned.best.arm.key]
        / rates[best.key],
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def exhaustive(arms: list[Arm], measure) -> dict:
    """Score of every arm, measured once each in random order."""
    rates = {}
    for number, arm in enumerate(random.Random(SEED).sample(arms, len(arms))):
        result: Result = measure(arm)
        rates[arm.key] = result.score
        print(f"{number + 1}/{len(arms)} {result.outcome} {result.score or 0:.0f} {arm.params}", flush=True)
    return rates


def paired(winner: Arm, best: Arm) -> list[float]:
    """Speed of the winner over that of the best, from steps run in turn."""
    steps = []
    for arm in (winner, best):
        train = trainer(arm.shape, arm.step)
        train.allocate()
        steps.append((train, arm))
        for _ in range(WARM_UP):
            train(random_batches(arm.shape, arm.step), 1e-3)
    ratios = []
    for number in range(PAIRS):
        seconds = {}
        for index in (0, 1) if number % 2 else (1, 0):
            train, arm = steps[index]
            start = time.perf_counter()
            train(random_batches(arm.shape, arm.step), 1e-3)
            seconds[index] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[0])
    return ratios


if __name__ == "__main__":
    main()
