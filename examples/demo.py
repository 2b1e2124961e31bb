"""The main job in a few minutes on a CPU: plan for a card, plan for this machine, train, sample, report.

Run it with ``make demo`` or ``python examples/demo.py``; everything it writes lies under ``demo-run/``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo_corpus import write_corpus

OUT = Path("demo-run")
CPU_PLAN = [
    "plan", "--gpu", "cpu", "--vram", "3GiB", "--params", "7M", "--block-size", "128", "--tokens-per-step", "2048",
    "--token-budget", "300k",
]  # fmt: skip
STEPS = 80
MUST_REACH = 7.0


def vramplan(*args: str) -> None:
    """Run one command as a user would, showing it first."""
    print(f"\n$ vramplan {' '.join(args)}", flush=True)
    subprocess.run([sys.executable, "-m", "vramplan", *args], check=True)


def main() -> int:
    """Run the whole job; 1 when the loss did not fall as far as it should."""
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    vramplan("plan", "--gpu", "4070", "--params", "125M")

    facts = write_corpus(OUT / "corpus.parquet")
    print(f"\nWrote {OUT / 'corpus.parquet'}: {facts}", flush=True)
    run = str(OUT / "run")
    vramplan(*CPU_PLAN, "-o", str(OUT / "plan.json"))
    vramplan("apply", str(OUT / "plan.json"), "--max-steps", str(STEPS), "-o", str(OUT / "run.toml"))
    vramplan("train", str(OUT / "run.toml"), "--data", str(OUT / "corpus.parquet"), "--out", run)
    vramplan("sample", run, "--prompt", "The function returns", "--max-new-tokens", "40")
    vramplan("report", run)
    vramplan("report", run, "--html", str(OUT / "report.html"))

    metrics = (OUT / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    seconds = time.monotonic() - started
    print(f"\nLoss fell from {losses[0]:.2f} to {losses[-1]:.2f} in {STEPS} steps; {seconds:.0f} s in all.")
    if losses[-1] >= MUST_REACH:
        print(f"The demo failed: the loss should be below {MUST_REACH}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
