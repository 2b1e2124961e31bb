"""``probe`` and ``ledger`` as a user types them, and how what they keep reaches the next plan."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import vramplan
from vramplan.cli import main, probing
from vramplan.memory_probe import probe as probe_module
from vramplan.memory_probe.ledger import Ledger
from vramplan.memory_probe.measurement import Measurement
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig

REPOSITORY = Path(vramplan.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
SIZE = 8 * 10**9
CONFIG = """
[model]
n_layer = 2
n_head = 2
n_embd = 64
vocab_size = 512
block_size = 64
[step]
batch_size = 4
dtype = "float32"
device = "cpu"
[train]
max_steps = 5
"""


def made(**changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "id": uuid.uuid4().hex, "when": "2026-05-01T10:00:00+00:00", "version": "0.1.0", "outcome": "fits",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 64}, "step": {"batch_size": 4}, "architecture": "8.9",
        "device": "NVIDIA GeForce RTX 4070", "method": "allocator statistics", "reason": "ran to its end",
        "process_bytes": int(1.003 * SIZE), "expected_process_bytes": SIZE,
    }  # fmt: skip
    return Measurement.model_validate(values | changes)


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(map(str, words)), prog_name="vramplan")
    assert result.exit_code == code, result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.output
    return result


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kept" / "ledger.sqlite"
    monkeypatch.setenv("VRAMPLAN_LEDGER", str(path))
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks to be probed; the answer is ``asked["answer"]``."""
    seen: dict[str, Any] = {"answer": made()}

    def instead(shape: Shape, step: StepConfig, **given: Any) -> Measurement:
        seen.update(given, shape=shape, step=step)
        answer: Measurement = seen["answer"]
        return answer

    monkeypatch.setattr(probe_module, "probe", instead)
    return seen


def kept(path: Path) -> list[Measurement]:
    with Ledger(path) as found:
        return list(found.measurements())


# ------------------------------------------------------------------- probe


def test_json_is_one_object_and_the_measurement_is_kept(config: Path, ledger: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vramplan", "probe", str(config), "--steps", "3", "--phases", "all", "--json"],
        capture_output=True, encoding="utf-8", check=False, env={**ENVIRONMENT, "VRAMPLAN_LEDGER": str(ledger)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["outcome"], answer["architecture"], len(answer["step_seconds"])) == ("fits", "cpu", 1)
    assert abs(answer["allocated_error"]) < 0.01
    assert "evaluation" in answer["phase_peaks"]
    assert kept(ledger) == [Measurement.read(done.stdout)]


def test_a_ledger_that_cannot_be_used_does_not_take_the_result_away(config: Path, tmp_path: Path) -> None:
    result = run("probe", config, "--steps", 3, "--ledger", tmp_path)
    for words in ("2L/2H/64E", "fits on", "allocated", "1 steps timed"):
        assert words in result.stdout
    assert result.stderr.startswith(f"Not kept: the ledger {tmp_path} cannot be used (it is no file)")


def test_a_child_that_outgrows_its_limit_is_exit_code_three(config: Path, ledger: Path) -> None:
    assert "host memory" in run("probe", config, "--host-memory", "30MiB", code=3).stdout
    assert [m.outcome for m in kept(ledger)] == ["out_of_memory"]


@pytest.mark.parametrize(
    ("outcome", "reason", "code"),
    [
        ("fits", "", 0), ("out_of_memory", "", 3), ("spilled", "", 3), ("not_memory", "", 1), ("timed_out", "", 1),
        ("killed", "", 1), ("killed", "stopped by Ctrl-C", 130),
    ],
)  # fmt: skip
def test_every_outcome_has_its_exit_code(
    outcome: str, reason: str, code: int, config: Path, asked: dict[str, Any], ledger: Path
) -> None:
    asked["answer"] = made(outcome=outcome, reason=reason)
    assert run("probe", config, code=code).stdout
    assert json.loads(run("probe", config, "--json", "--no-ledger", code=code).stdout)["outcome"] == outcome
    assert kept(ledger) == [asked["answer"]]


def test_help_states_the_exit_codes() -> None:
    text = " ".join(run("probe", "-h").stdout.split())
    assert "0 it fits, 3 out of memory or spilled, 1 it failed otherwise, 2 bad input, 130 Ctrl-C" in text


def test_options_arrive(config: Path, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("probe", config)
    expected: dict[str, Any] = {
        "steps": 5, "cap_bytes": None, "everything": False, "seconds": None, "host_bytes": None, "alloc_conf": "",
    }  # fmt: skip
    assert {name: asked[name] for name in expected} == expected
    assert (asked["step"].device, asked["step"].compile) == ("cpu", False)
    assert asked["shape"].n_embd == 64

    monkeypatch.setattr(probing, "live_gpu", lambda: object())
    run("probe", config, "--device", "cuda", "--compile", "--cap", "11.5GiB", "--steps", 7, "--timeout", 9, "--phases",
        "all", "--host-memory", "2GB", "--alloc-conf", "expandable_segments:True", "--no-ledger")  # fmt: skip
    expected = {
        "steps": 7, "cap_bytes": int(11.5 * 2**30), "everything": True, "seconds": 9.0, "host_bytes": 2 * 10**9,
        "alloc_conf": "expandable_segments:True",
    }  # fmt: skip
    assert {name: asked[name] for name in expected} == expected
    assert (asked["step"].device, asked["step"].compile) == ("cuda", True)


def test_a_plan_and_a_run_directory_can_be_probed(asked: dict[str, Any], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run("plan", "--gpu", "4070", "--params", "125M", "--top", 3, "-o", plan)
    chosen = json.loads(plan.read_text())["plans"][2]["config"]
    run("probe", plan, "--rank", 3, "--device", "cpu", "--no-compile")
    assert (asked["shape"].n_embd, asked["step"].batch_size) == (chosen["n_embd"], chosen["batch_size"])
    assert (asked["step"].device, asked["step"].compile) == ("cpu", False)
    assert "--rank=4 is beyond the 3 plans" in run("probe", plan, "--rank", 4, "--device", "cpu", code=2).stderr
    (tmp_path / "run").mkdir()
    RunConfig.from_toml(CONFIG).save(tmp_path / "run" / "config.toml")
    run("probe", tmp_path / "run")
    assert (asked["shape"].n_embd, asked["step"].batch_size) == (64, 4)


BAD = [
    (["--cap", "8"], '--cap="8" has no unit: write 8GiB'),
    (["--cap", "0GiB"], '--cap="0" must be above zero'),
    (["--host-memory", "0GB"], '--host-memory="0" must be above zero'),
    (["--timeout", "nan"], '--timeout="nan" is no number'),
    (["--ledger", ""], '--ledger="" is empty'),
    (["--ledger", "n" * 300], "--ledger="),
    (["--rank", "2"], "--rank=2 means nothing"),
    (["--alloc-conf", "expandable_segments:True"], '--alloc-conf="expandable_segments:True" means nothing on a CPU'),
    (["--device", "cuda"], '--device="cuda" finds no NVIDIA card: use --device cpu'),
    (["--steps", "2"], "Invalid value for '--steps': 2"),
    (["--timeout", "0"], "Invalid value for '--timeout'"),
    (["--rank", "0"], "Invalid value for '--rank'"),
    (["--phases", "some"], "Invalid value for '--phases'"),
]


@pytest.mark.parametrize(("words", "error"), BAD)
def test_bad_input_is_one_clear_error(
    words: list[str], error: str, config: Path, asked: dict[str, Any], ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "live_gpu", lambda: None)
    result = run("probe", config, *words, code=2)
    assert error in result.stderr, result.stderr
    assert result.stdout == ""
    assert ("shape" in asked, ledger.exists()) == (False, False)


def test_bad_values_come_together(config: Path) -> None:
    text = run(
        "probe", config, "--cap", "x", "--host-memory", "0GiB", "--timeout", "nan", "--ledger", "", code=2
    ).stderr
    for problem in ("4 problems", "--cap=", "--host-memory=", "--timeout=", "--ledger="):
        assert problem in text


FILES = {
    "none.toml": (None, "does not exist"),
    "none.json": (None, "does not exist"),
    "bad.toml": ("[model", "is not valid TOML"),
    "shape.toml": (CONFIG.replace("n_head = 2", "n_head = 3"), "n_embd=64 is not divisible by n_head=3"),
    "cuda.toml": (CONFIG.replace('"cpu"', '"cuda"'), "use --device cpu"),
    "script.toml": (CONFIG.replace("[train]", 'workload = "nanogpt"\nloss = "full"\n[train]'), "use workload=vramplan"),
    "deep.json": ('{"a":' * 100_000, "is not a JSON file that can be read"),
    "other.json": ("{}", "is not a plan file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_probed_is_one_clear_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "live_gpu", lambda: None)
    text, error = FILES[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    result = run("probe", tmp_path / name, code=2)
    assert error in result.stderr, result.stderr
    assert result.stdout == ""


def test_a_directory_without_a_run_and_a_file_of_another_are_refused(tmp_path: Path) -> None:
    assert "holds no run" in run("probe", tmp_path, code=2).stderr
    if os.name != "nt" and os.geteuid() != 0:
        (tmp_path / "closed.toml").write_text(CONFIG)
        (tmp_path / "closed.toml").chmod(0)
        assert "cannot be read" in run("probe", tmp_path / "closed.toml", code=2).stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_it_and_its_child(config: Path, ledger: Path, tmp_path: Path) -> None:
    before = {p.name for p in Path("/proc").glob("[0-9]*")} if Path("/proc").is_dir() else set()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    probe = subprocess.Popen(
        [sys.executable, "-m", "vramplan", "probe", str(config), "--steps", "1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
        env={**ENVIRONMENT, "VRAMPLAN_LEDGER": str(ledger), "TMPDIR": str(temporary)},
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (list(temporary.rglob("report.jsonl")) and children_of(probe.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)  # within torch's import, or beyond
    children = children_of(probe.pid)
    os.kill(probe.pid, signal.SIGINT)
    stdout, stderr = probe.communicate(timeout=20)
    assert probe.returncode == 130
    assert "killed: stopped by Ctrl-C" in stdout
    assert stderr == ""
    if before:
        assert len(children) == 1
        assert not any(alive(pid) for pid in children)
    assert list(temporary.iterdir()) == []
    assert [(m.outcome, m.reason) for m in kept(ledger)] == [("killed", "stopped by Ctrl-C")]


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    return False


# ------------------------------------------------------------------- ledger


def test_without_a_ledger_every_command_says_so(ledger: Path, tmp_path: Path) -> None:
    empty = f"No measurements in {ledger}.\n"
    assert run("ledger", "list").stdout == empty
    assert run("ledger", "list", "--json").stdout == ""
    exported = run("ledger", "export")
    assert (exported.stdout, exported.stderr) == ("", empty)
    assert "Wrote 0 measurements" in run("ledger", "export", "-o", tmp_path / "o.jsonl").stdout
    assert run("ledger", "import", tmp_path / "o.jsonl").stdout == "0 new, 0 known already, 0 refused.\n"
    assert run("ledger", "prune", "--outcome", "fits").stdout == f"Deleted 0 measurements; 0 left in {ledger}.\n"
    assert 'ID="ab" is not in the ledger: see: vramplan ledger list' in run("ledger", "show", "ab", code=2).stderr
    assert not ledger.parent.exists()


def test_what_is_kept_is_listed_shown_shared_and_pruned(ledger: Path, tmp_path: Path) -> None:
    first, second = made(id="aa" * 16, step_seconds=(0.1 + 0.2,), tokens_per_second=1 / 3), made(id="ab" * 16)
    third = made(id="bb" * 16, outcome="timed_out", when="2026-06-01T00:00:00+00:00", process_bytes=None)
    with Ledger(ledger) as found:
        found.add([first, second, third])
    listed = run("ledger", "list").stdout
    for words in ("aaaaaaaa", "bbbbbbbb", "RTX 4070", "+0.30%", "timed out", f"3 measurements in {ledger}."):
        assert words in listed
    one = run("ledger", "list", "--outcome", "timed_out").stdout
    assert ("aaaaaaaa" in one, f"1 of 3 measurements in {ledger}." in one) == (False, True)
    assert f"0 of 3 measurements in {ledger}." in run("ledger", "list", "--outcome", "killed").stdout
    assert [Measurement.read(line) for line in run("ledger", "list", "--json").stdout.splitlines()] == kept(ledger)

    assert "timed out on NVIDIA GeForce RTX 4070" in run("ledger", "show", "bb").stdout
    assert run("ledger", "show", "a").stdout.count("fits on") == 2
    assert Measurement.read(run("ledger", "show", "aa", "--json").stdout) == first
    for odd in ("*", "[ab]", "zz", ""):
        assert "ID=" in run("ledger", "show", odd, code=2).stderr

    assert run("ledger", "export", "-o", tmp_path / "o.jsonl").stdout.startswith("Wrote 3 measurements")
    assert (tmp_path / "o.jsonl").read_text() == run("ledger", "export").stdout
    other = tmp_path / "other.sqlite"
    for answer in ("3 new, 0 known already, 0 refused.\n", "0 new, 3 known already, 0 refused.\n"):
        assert run("ledger", "import", tmp_path / "o.jsonl", "--ledger", other).stdout == answer
    assert kept(other) == kept(ledger) == [first, second, third]

    assert run("ledger", "prune", "--outcome", "timed_out", "--before", "2026-06-01").stdout.startswith("Deleted 0 m")
    assert run("ledger", "prune", "--outcome", "timed_out").stdout.startswith("Deleted 1 measurement; 2 left")
    assert run("ledger", "prune", "--before", "2026-05-31").stdout.startswith("Deleted 2 measurements; 0 left")
    assert kept(other) == [first, second, third]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_good_lines_are_kept_and_bad_ones_named(encoding: str, ledger: Path, tmp_path: Path) -> None:
    """Windows' own shell writes UTF-16 with ``>``, its editors a mark at the beginning."""
    good = made(reason="ein Größenfehler\u2028")
    shared = tmp_path / "shared.jsonl"
    shared.write_bytes(f"{good.model_dump_json()}\r\nrubbish \x1b[31m\r\n{made().line()}\r\n".encode(encoding))
    result = run("ledger", "import", shared, code=2)
    assert result.stdout == "2 new, 0 known already, 1 refused.\n"
    assert result.stderr.startswith("line 2: ")
    assert "\x1b" not in result.stderr
    assert kept(ledger)[0] == good
    (tmp_path / "binary").write_bytes(b"\x80\x81")
    for name, words in (("binary", "it is no UTF-8 text"), ("none", "No such file"), (".", "directory")):
        assert words in run("ledger", "import", tmp_path / name, code=2).stderr


def test_text_of_others_neither_marks_up_nor_commands_the_terminal(tmp_path: Path) -> None:
    evil = "[/red][bold]x\x1b]0;title\x07\x1b[2J"
    shared = made(device=evil, reason=evil, alloc_conf=evil, phase_peaks={evil: 5}, when="2026-05-01[10:00")
    (tmp_path / "s.jsonl").write_text(shared.line())
    run("ledger", "import", tmp_path / "s.jsonl")
    for words in (("list",), ("show", shared.id)):
        shown = run("ledger", *words).stdout
        assert "[/red][bold]x" in shown.replace("\n", "").replace(" ", "")
        assert "\x1b" not in shown
        assert "\x07" not in shown


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["list", "--outcome", "fit"], '--outcome="fit" is not one of the outcomes: did you mean fits?'),
        (["prune"], "--before or --outcome is required"),
        (["prune", "--before", "soon"], '--before="soon" is not a date: write it as 2026-11-21'),
        (["prune", "--before", "0001-01-01T00:00+14:00"], "is not a date"),
        (["prune", "--outcome", "all"], "is not one of the outcomes"),
        (["list", "--ledger", " "], "is empty"),
        (["export", "-o", "."], "cannot be written (Is a directory)"),
    ],
)
def test_what_a_ledger_command_cannot_do_is_one_clear_error(words: list[str], error: str, ledger: Path) -> None:
    with Ledger(ledger) as found:
        found.add([made()])
    assert error in run("ledger", *words, code=2).stderr
    assert len(kept(ledger)) == 1


def test_an_export_does_not_overwrite_the_ledger(ledger: Path, tmp_path: Path) -> None:
    with Ledger(ledger) as found:
        found.add([made()])
    (tmp_path / "link").symlink_to(ledger)
    for output in (ledger, tmp_path / "link"):
        assert "is the ledger itself" in run("ledger", "export", "-o", output, code=2).stderr
    assert len(kept(ledger)) == 1


def test_a_damaged_ledger_is_said_and_a_place_that_is_none_is_refused(ledger: Path, tmp_path: Path) -> None:
    ledger.parent.mkdir()
    ledger.write_text("garbage")
    result = run("ledger", "list")
    assert result.stdout == f"No measurements in {ledger}.\n"
    what, kept_as = "is damaged (file is not a database)", f"{ledger}.damaged"
    assert result.stderr == f"The ledger {ledger} {what}. It is kept as {kept_as}; a new one is begun.\n"
    for words in (("list",), ("show", "ab"), ("export",), ("prune", "--outcome", "fits")):
        text = run("ledger", *words, "--ledger", tmp_path, code=1).stderr
        assert "cannot be used (it is no file); name another with --ledger FILE or $VRAMPLAN_LEDGER" in text


# ------------------------------------------------------------------- evidence


def measured(ledger: Path, n: int, **changes: Any) -> None:
    """``n`` configurations, the planner's favourite mode among them."""
    both = [{"batch_size": 4}, {"batch_size": 4, "compile": True}]
    with Ledger(ledger) as found:
        found.add(
            made(model={"n_layer": 1 + i, "n_head": 2, "n_embd": 64}, step=step, **changes)
            for i in range(n) for step in both
        )  # fmt: skip


def reason(gpu: str = "4070") -> str:
    result = run("plan", "--gpu", gpu, "--params", "125M", "--top", 1, "--json")
    words: str = json.loads(result.stdout)["plans"][0]["oom_risk_reason"]
    return words


@pytest.fixture
def without() -> dict[str, str]:
    """The reason for a risk that has no evidence, by card."""
    return {gpu: reason(gpu) for gpu in ("4070", "3060")}


def test_measurements_of_an_architecture_reach_its_cards_and_no_others(ledger: Path, without: dict[str, str]) -> None:
    assert "no measurements of this card" in without["4070"]
    measured(ledger, 3)
    assert "3 measured configurations correct a stated margin" in reason()
    assert reason("3060") == without["3060"]
    measured(ledger, 120)
    assert "of 120 measured configurations needed more" in reason()
    assert reason("3060") == without["3060"]
    measured(ledger, 7, architecture="8.6")
    assert "7 measured configurations" in reason("3060")


def test_measurements_that_ended_early_are_no_evidence(ledger: Path, without: dict[str, str]) -> None:
    measured(ledger, 9, outcome="out_of_memory")
    measured(ledger, 9, architecture="cpu", allocated_bytes=10**9, expected_allocated_bytes=10**9)
    assert reason() == without["4070"]


@pytest.mark.parametrize("kind", ["a folder", "garbage", "another program's", "too long a name", "evil figures"])
def test_a_ledger_that_cannot_be_used_does_not_stop_a_plan(
    kind: str, ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    measured(ledger, 5)
    if kind == "a folder":
        monkeypatch.setenv("VRAMPLAN_LEDGER", str(tmp_path))
    elif kind == "garbage":
        ledger.write_bytes(b"garbage" * 1000)
    elif kind == "too long a name":
        monkeypatch.setenv("VRAMPLAN_LEDGER", str(tmp_path / ("a" * 300)))
    else:
        with contextlib.closing(sqlite3.connect(ledger)) as connection, connection:
            connection.execute(
                "alter table measurements rename to other"
                if kind == "another program's" else "update measurements set residual = 9e999"
            )  # fmt: skip
    result = run("plan", "--gpu", "4070", "--params", "125M", "--top", 1, "--json")
    assert "no measurements of this card" in json.loads(result.stdout)["plans"][0]["oom_risk_reason"]
    if kind == "garbage":
        assert "is damaged" in result.stderr
    elif kind != "evil figures":
        assert result.stderr.startswith("the ledger ")
        assert result.stderr.endswith("planned without it\n")


def test_evidence_costs_a_plan_no_import_of_pydantic_and_hardly_any_time(ledger: Path) -> None:
    """What is timed is the ledger's part alone: a whole plan on a busy machine says little."""
    measured(ledger, 250)
    program = """
        import sys, time
        from vramplan.cli import main, planning
        from vramplan.cli.options import find_gpu, with_evidence
        card, start = find_gpu("4070"), time.process_time()
        found = with_evidence(card)
        print(time.process_time() - start, len(found.evidence.residuals), file=sys.stderr)
        try:
            main(["plan", "--gpu", "4070", "--params", "125M", "--json"])
        finally:
            print(*sys.modules, file=sys.stderr)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, check=True, env={**ENVIRONMENT, "VRAMPLAN_LEDGER": str(ledger)},
    )  # fmt: skip
    assert "of 250 measured configurations" in json.loads(done.stdout)["plans"][0]["oom_risk_reason"]
    figures, modules = done.stderr.splitlines()
    seconds, n = figures.split()
    assert (int(n), float(seconds) < 0.1) == (500, True)
    assert {"pydantic", "torch", "filelock", "platformdirs"}.isdisjoint(modules.split())
