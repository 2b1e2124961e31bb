"""How long after a movement of a control the planner's page shows the new verdict and timeline, and the levers.

    python benchmarks/page_latency.py [--moves 20]

Moves the batch slider of ``vramplan ui`` in Chromium and measures within the page: from the event to the change of the
verdict, and to that of the levers' table. Needs Chromium and Playwright.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys

MODELS = {"124M": 11, "350M": 16, "800M": 20, "1.5B": 23}
"""Sizes, and where the size slider stands for them."""

MOVE = """
async (place) => {
  const slider = document.forms.controls.elements["batch-place"];
  const since = performance.now();
  slider.value = place;
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  const seen = {};
  const watch = (id) => new Promise((done) => {
    const observer = new MutationObserver(() => {
      seen[id] = performance.now() - since; observer.disconnect(); done();
    });
    observer.observe(document.getElementById(id), {childList: true});
  });
  await Promise.all([watch("verdict-part"), watch("levers-part")]);
  return [seen["verdict-part"], seen["levers-part"]];
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=20, help="for each model")
    moves = parser.parse_args().moves
    chromium = shutil.which("chromium") or sys.exit("needs Chromium (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-u", "-m", "vramplan", "ui", "--no-browser", "--gpu", "4090"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server, sync_playwright() as play:
        address = re.search(r"http://\S+", server.stdout.readline() if server.stdout else "")
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(address[0] if address else "")
        print(f"{'model':<8}{'verdict and timeline, ms':>28}{'levers, ms':>24}   (median, 9th tenth)")
        for name, place in MODELS.items():
            page.evaluate(
                "(at) => { const s = document.forms.controls.elements.size; s.value = at;"
                " s.dispatchEvent(new Event('input', {bubbles: true})); }",
                place,
            )
            page.wait_for_timeout(3000)
            found = []
            for move in range(moves):
                found.append(page.evaluate(MOVE, 1 + move % 4))
                page.wait_for_timeout(1500)  # the slow parts are through
            columns = [_words(column) for column in zip(*found, strict=True)]
            print(f"{name:<8}{columns[0]:>28}{columns[1]:>24}", flush=True)
        browser.close()
        server.terminate()


def _words(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.0f}, {statistics.quantiles(values, n=10)[-1]:.0f}"


if __name__ == "__main__":
    main()
