"""The report and the planner's page in a real browser: Chromium without a window, driven by Playwright.

Skipped where there is no Chromium; VRAMPLAN_REQUIRE_BROWSER makes that a failure. Screenshots go to screenshots/.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vramplan.cli import main
from vramplan.runconfig import RunConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = Path(__file__).parent.parent.parent / "screenshots"
QUIET = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic",
]  # fmt: skip
PHONE = {"width": 375, "height": 740}
DESKTOP = {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("VRAMPLAN_REQUIRE_BROWSER"):
            pytest.fail("VRAMPLAN_REQUIRE_BROWSER is set, and there is no Chromium")
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


class Visit:
    """One page, with everything it said and asked for."""

    def __init__(self, browser: Any, **settings: Any) -> None:
        self.context = browser.new_context(viewport=DESKTOP, accept_downloads=True, **settings)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def values(self) -> dict[str, float]:
        """The figures as the page has them."""
        found = self.page.eval_on_selector_all(
            "[data-value]", "all => all.map(e => [e.dataset.value, e.dataset.exact, e.textContent])"
        )
        return {name: float(exact) for name, exact, shown in found if shown != "n/a"}

    def overflows(self) -> bool:
        """Whether the page is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def as_json(*words: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*(str(word) for word in words), "--json"], prog_name="vramplan")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("report")
    as_json("plan", "--gpu", "4070", "--params", "125M", "-o", folder / "plan.json")
    answer = as_json("report", folder / "plan.json", "--html", folder / "report.html")
    return folder / "report.html", answer


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_report_opens_quietly_in_any_window(
    browser: Any, report: tuple[Path, dict[str, Any]], scheme: str, window: dict[str, int]
) -> None:
    path, answer = report
    visit = Visit(browser, color_scheme=scheme)
    visit.page.set_viewport_size(window)
    visit.page.goto(path.as_uri())
    assert visit.said == []
    assert visit.asked == [path.as_uri()]
    assert not visit.overflows()
    values = visit.values()
    assert values["process_bytes"] == answer["estimate"]["process_bytes"]
    assert values["tokens_per_second"] == answer["tokens_per_second"]
    dark = visit.page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark is (scheme == "dark")
    visit.page.screenshot(path=SCREENSHOTS / f"report-{scheme}-{window['width']}.png", full_page=True)


def test_the_report_can_be_used_without_a_mouse_and_printed(
    browser: Any, report: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    visit = Visit(browser)
    visit.page.goto(report[0].as_uri())
    table = visit.page.locator("details", has=visit.page.locator("table")).last
    assert not table.locator("table").is_visible()
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Enter")
    assert table.locator("table").is_visible()
    assert table.locator("tbody tr").count() == len(report[1]["ways"])
    for picture in visit.page.locator("svg[role=img]").all():
        assert len(picture.get_attribute("aria-label")) > 30
    visit.page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


# -------------------------------------------------------------------- the planner's page


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command, as a user starts it: its address and its process."""
    environment = {**os.environ, "VRAMPLAN_LEDGER": str(folder / "none.sqlite")}
    command = [sys.executable, "-u", "-m", "vramplan", "ui", "--no-browser", "--gpu", "4070"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
            assert found is not None
            yield found[0], server
        finally:
            server.kill()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("ui")) as (found, _):
        yield found


@pytest.fixture
def planner(browser: Any, address: str) -> Iterator[Visit]:
    visit = Visit(browser)
    visit.page.goto(address)
    settle(visit)
    yield visit
    assert visit.said == []
    assert [url for url in visit.asked if not url.startswith(address)] == []


def settle(visit: Visit) -> None:
    """Wait until the page shows what its controls ask for, slow parts included."""
    wait(visit, "document.body.dataset.shown === query() && document.body.dataset.rested === query() && !running")


def wait(visit: Visit, condition: str) -> None:
    """Wait for a condition in the page. Its policy forbids what wait_for_function does."""
    for _ in range(600):
        if visit.page.evaluate(condition):
            return
        visit.page.wait_for_timeout(50)
    raise AssertionError(condition)


def test_the_page_shows_what_the_command_that_it_offers_prints(planner: Visit) -> None:
    command = shlex.split(planner.page.locator("#command").inner_text())
    answer = as_json(*command[1:])
    values = planner.values()
    for name in ("process_bytes", "budget_bytes", "oom_risk", "needs_bytes", "tokens_per_second"):
        assert values[name] == answer[name], name
    assert "fits" in planner.page.locator("#verdict").inner_text()
    levers = planner.page.locator("#levers-part tbody tr").count()
    assert levers > 6
    assert planner.page.locator("svg").count() == 2
    planner.page.screenshot(path=SCREENSHOTS / "planner.png", full_page=True)


def test_sliders_and_lists_change_the_figures(planner: Visit) -> None:
    page, before = planner.page, planner.values()
    page.locator("input[name=batch-place]").press("ArrowRight")
    settle(planner)
    doubled = planner.values()
    assert doubled["process_bytes"] > 1.4 * before["process_bytes"]
    assert "does not fit" in page.locator("#verdict").inner_text()
    assert "Smallest change that fits" in page.locator("#repair").inner_text()
    planner.page.screenshot(path=SCREENSHOTS / "planner-no-fit.png", full_page=True)
    page.locator("input[name=free]").press("ArrowLeft")
    settle(planner)
    assert planner.values()["budget_bytes"] < doubled["budget_bytes"]
    page.locator("input[name=size]").press("ArrowLeft")
    settle(planner)
    assert planner.values()["process_bytes"] < doubled["process_bytes"]
    page.locator("select[name=gpu]").select_option("RTX 4090")
    settle(planner)
    assert planner.values()["budget_bytes"] > 2 * doubled["budget_bytes"]
    assert planner.values()["tokens_per_second"] > 1.5 * doubled["tokens_per_second"]
    command = shlex.split(page.locator("#command").inner_text())
    assert as_json(*command[1:])["process_bytes"] == planner.values()["process_bytes"]


def test_no_movement_is_lost(planner: Visit) -> None:
    page = planner.page
    slider = page.locator("input[name=batch-place]")
    for _ in range(3):
        slider.press("ArrowRight")
    settle(planner)
    assert "128 x 4" in page.locator("#batch-words").inner_text()
    page.evaluate(
        "() => { const s = document.forms.controls.elements['batch-place'];"
        " for (const place of [1, 2, 3, 9, 0, 6, 5]) { s.value = place;"
        " s.dispatchEvent(new Event('input', {bubbles: true})); } }"
    )
    settle(planner)
    assert "32 x 16" in page.locator("#batch-words").inner_text()
    before = float(page.locator("input[name=free]").input_value())
    for _ in range(20):
        page.locator("input[name=free]").press("ArrowLeft")
    settle(planner)
    assert float(page.locator("input[name=free]").input_value()) == pytest.approx(before - 0.20)
    page.locator("input[name=size]").press("ArrowLeft")
    slider.press("ArrowLeft")
    settle(planner)
    assert "16 x 32" in page.locator("#batch-words").inner_text()
    assert "100.0M" in page.locator("#size-words").inner_text()


def test_a_server_that_has_ended_is_said(browser: Any, tmp_path: Path) -> None:
    visit = Visit(browser)
    with serving(tmp_path) as (address, server):
        visit.page.goto(address)
        settle(visit)
        server.kill()
    visit.page.locator("input[name=batch-place]").press("ArrowRight")
    wait(visit, "document.getElementById('problem').textContent !== ''")
    assert "Is vramplan ui still running?" in visit.page.locator("#problem").inner_text()


def test_best_settings_are_those_of_the_plan(planner: Visit) -> None:
    page = planner.page
    page.locator("select[name=checkpointing]").select_option("block")
    settle(planner)
    slow = planner.values()["tokens_per_second"]
    page.locator("#best").click()
    wait(planner, "!document.getElementById('best').disabled")
    settle(planner)
    found = planner.values()
    plan = as_json(
        "plan", "--gpu", "4070", "--vram", "10.96GiB", "--n-layer", "12", "--n-head", "12", "--n-embd", "768"
    )
    assert found["tokens_per_second"] == plan["plans"][0]["tokens_per_second"] > slow
    assert found["process_bytes"] == plan["plans"][0]["estimate"]["process_bytes"]


def test_the_configuration_can_be_downloaded(planner: Visit, tmp_path: Path) -> None:
    with planner.page.expect_download() as waiting:
        planner.page.locator("#download").click()
    waiting.value.save_as(tmp_path / "run.toml")
    config = RunConfig.load(tmp_path / "run.toml")
    assert config.plan.process_bytes == planner.values()["process_bytes"]
    assert config.shape.label == "12L/12H/768E"


def test_what_is_impossible_is_said_and_can_be_undone(planner: Visit) -> None:
    page = planner.page
    page.locator("select[name=optimizer]").select_option("adamw-in-backward")
    wait(planner, "document.getElementById('problem').textContent !== ''")
    assert "grad_accum=32 is impossible" in page.locator("#problem").inner_text()
    settle(planner)
    assert not page.locator("#copy").is_visible()
    planner.page.screenshot(path=SCREENSHOTS / "planner-impossible.png")
    page.locator("select[name=optimizer]").select_option("adamw8bit")
    settle(planner)
    assert page.locator("#problem").inner_text() == ""
    assert planner.values()["process_bytes"] > 0


def test_the_page_fits_a_phone(browser: Any, address: str) -> None:
    visit = Visit(browser, color_scheme="dark")
    visit.page.set_viewport_size(PHONE)
    visit.page.goto(address)
    settle(visit)
    assert not visit.overflows()
    visit.page.screenshot(path=SCREENSHOTS / "planner-phone.png", full_page=True)
