"""The planner's page without a browser: what its queries give, and whom its server answers."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vramplan.cli import main
from vramplan.errors import ConfigError
from vramplan.planner import memory
from vramplan.planner.gpu import budget, find_gpu
from vramplan.planner.levers import EXPANDABLE, levers, rough_levers
from vramplan.report.page import LOSSES, SELECTS, SIZES, Offer, Page
from vramplan.report.page_server import PageServer
from vramplan.runconfig import RunConfig
from vramplan.units import GIB, gib

CARDS = [Offer(card, budget(card).budget_bytes) for card in (find_gpu("4070"), find_gpu("H100"))]


def no_search(words: list[str]) -> Any:
    raise AssertionError(words)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(CARDS, 0.01, "2.13", no_search)


def estimate(words: list[str]) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*words, "--json"], prog_name="vramplan")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_card_without_bfloat16_opens_with_what_it_can_do() -> None:
    turing = Offer(find_gpu("T4"), budget(find_gpu("T4")).budget_bytes)
    page = Page([turing, *CARDS], 0.01, "2.13", no_search)
    assert "problem" not in page.view({})
    assert page.wanted({}).step.dtype == "float16"
    assert page.wanted({"gpu": CARDS[0].gpu.name}).step.dtype == "bfloat16"
    assert "<option selected>float16</option>" in page.front()


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"batch": "7", "size": "5"},
        {"loss": "chunked 512", "checkpointing": "block", "compile": "off", "free": "5.5"},
        {"gpu": "H100 SXM", "dtype": "float32", "block_size": "256", "tokens_per_step": "65536", "batch": "64"},
        {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "optimizer": "muon", "batch": "4"},
        {"workload": "nanogpt", "batch": "4"},
    ],
)
def test_its_figures_are_those_of_the_command_it_offers(page: Page, query: dict[str, str]) -> None:
    query = {**query, "gpu": next(name for name in page.cards if name.startswith(query.get("gpu", "RTX 4070")))}
    found = page.view(query)
    assert "problem" not in found
    answer = estimate(shlex.split(found["command"])[1:])
    for name, value in found["values"].items():
        assert value == answer[name], name
    assert f'data-exact="{answer["process_bytes"]}"' in found["verdict"]


def test_every_stop_of_the_size_slider_is_a_model_near_it(page: Page) -> None:
    for place, size in enumerate(SIZES):
        shape = page.wanted({"size": str(place)}).shape
        assert shape.parameters / size == pytest.approx(1, abs=0.1)
    assert page.wanted({"size": "9999"}).size == SIZES[-1]


def test_every_choice_of_every_list_is_priced_or_refused_in_words(page: Page) -> None:
    for name, choices in SELECTS.items():
        for value in choices:
            found = page.view({name: value, "size": "0", "batch": "1"})
            assert ("values" in found) is not ("problem" in found), (name, value)
            assert found.get("problem", "words") != ""
    assert {loss.split()[0] for loss in LOSSES} == set(SELECTS["loss"][0:1]) | {"chunked"}


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"gpu": "RTX 1"}, "gpu="),
        ({"free": "x"}, "free="),
        ({"free": "-1"}, "free="),
        ({"free": "nan"}, "free="),
        ({"batch": "-4"}, "batch="),
        ({"size": "1e9"}, "size="),
        ({"dtype": "int4", "loss": "none"}, "2 problems"),
    ],
)
def test_what_no_control_sends_is_refused(page: Page, query: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        page.view(query)


def test_levers_are_rough_while_controls_move_and_exact_at_rest(page: Page) -> None:
    wanted = page.wanted({"batch": "8"})
    full = memory.estimate(wanted.shape, wanted.step, wanted.offer.gpu)
    exact = levers(full, wanted.offer.gpu, wanted.budget_bytes, 0.01)
    rough = {lever.name: lever for lever in rough_levers(full, wanted.offer.gpu)}
    moving, resting = page.view({"batch": "8"})["levers"], page.more({"batch": "8"})["levers"]
    assert "≈" in moving
    assert "≈" not in resting
    for lever in exact:
        assert lever.name in resting
        assert f"<td>{gib(lever.process_bytes)}</td>" in resting
        if lever.name != EXPANDABLE:
            assert lever.name in moving
            assert rough[lever.name].speed_ratio == lever.speed_ratio
            assert rough[lever.name].process_bytes == pytest.approx(lever.process_bytes, rel=0.1)


def test_the_configuration_is_what_is_shown(page: Page, tmp_path: Path) -> None:
    query = {"batch": "8", "loss": "chunked 2048", "optimizer": "adamw8bit"}
    (tmp_path / "run.toml").write_text(page.configuration(query), encoding="utf-8")
    config = RunConfig.load(tmp_path / "run.toml")
    wanted = page.wanted(query)
    assert config.shape == wanted.shape
    assert config.step_config == replace(wanted.step, torch=config.step_config.torch)
    assert config.plan.budget_bytes == wanted.budget_bytes
    assert config.train.token_budget == 20 * wanted.shape.parameters
    with pytest.raises(ConfigError, match="grad_accum"):
        page.configuration({"optimizer": "adamw-in-backward", "compile": "off"})


# -------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server(page: Page) -> Iterator[PageServer]:
    with PageServer(page, 0) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def get(server: PageServer, path: str, **headers: str) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_it_answers_on_the_loopback_address_with_a_strict_policy(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    status, body, headers = get(server, "/")
    assert status == 200
    assert b"Will it fit?" in body
    assert b"http" not in body.replace(b"https://", b"http").split(b"<body>")[1]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe-eval" not in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"


def test_it_answers_nobody_who_means_another_host(server: PageServer) -> None:
    for name in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        assert get(server, "/view", Host=name)[0] == 403
    assert get(server, "/view", Sec_Fetch_Site="cross-site")[0] == 403
    assert get(server, "/view", Host=f"localhost:{server.server_port}")[0] == 200


@pytest.mark.parametrize("path", ["/nothing", "/../../etc/passwd", "/page.js/..", "/style.css"])
def test_there_is_nothing_else_to_have(server: PageServer, path: str) -> None:
    assert get(server, path)[0] == 404


@pytest.mark.parametrize("query", ["batch=x", "gpu=%00", "a=" + "b" * 9000, "&" * 200, "size=%ff", "free=1e999"])
def test_nonsense_is_answered_in_words(server: PageServer, query: str) -> None:
    status, body, _ = get(server, f"/view?{query}")
    assert status == 200
    assert {"problem", "values"} & set(json.loads(body))


def test_an_impossible_configuration_is_no_download(server: PageServer) -> None:
    status, body, headers = get(server, "/configuration.toml?optimizer=adamw-in-backward")
    assert status == 400
    assert b"grad_accum" in body
    assert headers["Content-Disposition"] is None
    status, body, headers = get(server, "/configuration.toml")
    assert status == 200
    assert "run.toml" in headers["Content-Disposition"]


def test_a_port_that_is_taken_is_an_error(server: PageServer, page: Page) -> None:
    with pytest.raises(ConfigError, match="--port"):
        PageServer(page, server.server_port)


INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from vramplan.cli import main; main(sys.argv[1:])"
)
"""Whoever runs the tests in the background has SIGINT ignored, and so would their children."""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_with_a_signal(how: signal.Signals) -> None:
    command = [sys.executable, "-u", "-c", INTERRUPTIBLE, "ui", "--no-browser", "--max-risk", "2%"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as done:
        try:
            assert done.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:(\d+)/", done.stdout.readline())
            assert address is not None
            connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=30)
            connection.request("GET", "/best")
            found = json.loads(connection.getresponse().read())
            connection.close()
            assert {"batch", "dtype", "compile", "loss", "checkpointing", "optimizer"} == set(found)
            done.send_signal(how)
            out, err = done.communicate(timeout=30)
        finally:
            done.kill()
    assert done.returncode == (0 if how == signal.SIGINT else -how), err
    assert how != signal.SIGINT or "Stopped" in out
    assert "Traceback" not in err


def test_free_memory_of_the_offer_is_the_default(page: Page) -> None:
    assert page.wanted({}).budget_bytes == int(10.96 * GIB)
    assert CARDS[0].budget_bytes - page.wanted({}).budget_bytes < 0.01 * GIB
