"""User plus system seconds of ``vramplan plan --gpu 4070 --params 125M --json`` from a cold interpreter.

    python benchmarks/plan_cold_start.py [RUNS]

Prints the median, minimum and maximum over RUNS (default 10) as JSON. Must stay under 0.6 s in the median.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

COMMAND = [sys.executable, "-m", "vramplan", "plan", "--gpu", "4070", "--params", "125M", "--json"]


def once() -> float:
    before = os.times()
    subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    once()  # compiles the bytecode
    seconds = [once() for _ in range(runs)]
    result = {"runs": runs, "median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
