"""``vramplan doctor`` as a user types it: exit codes, JSON, what is printed, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from vramplan.cli import COMMANDS, main
from vramplan.memory_probe import doctor
from vramplan.memory_probe.doctor import TOPICS
from vramplan.memory_probe.finding import Finding
from vramplan.report.doctor import findings_dict, print_findings

GOOD = Finding("disk", "ok", "Roomy.", "", {"free_bytes": 5})
WARNING = Finding("card", "warning", "None [here].", "look [elsewhere]")
PROBLEM = Finding("torch", "problem", "Broken.", "mend it")


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *words], prog_name="vramplan")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    findings: list[Finding] = []
    monkeypatch.setattr(doctor, "examine", lambda out: findings)
    return findings


def test_this_machine_is_examined(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vramplan", "doctor", "--json"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[2])},
        check=False,
    )
    answer = json.loads(done.stdout)
    assert [finding["topic"] for finding in answer["findings"]] == list(TOPICS)
    assert all(set(finding) == {"topic", "verdict", "text", "remedy", "facts"} for finding in answer["findings"])
    verdicts = {finding["verdict"] for finding in answer["findings"]}
    assert verdicts <= {"ok", "unknown", "warning", "problem"}
    assert done.returncode == int("problem" in verdicts), done.stderr
    assert answer["verdict"] in verdicts
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_only_a_problem_is_an_exit_code(found: list[Finding]) -> None:
    found += [GOOD, WARNING]
    assert run().exit_code == run("--json").exit_code == 0
    found += [PROBLEM]
    assert run().exit_code == 1
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdict"] == "problem"


def test_text_and_remedy_are_printed_as_they_are(found: list[Finding]) -> None:
    found += [GOOD, WARNING, PROBLEM]
    shown = run().stdout
    for words in ("None [here].", "remedy: look [elsewhere]", "1 problem, 1 warning."):
        assert words in shown
    assert shown.count("remedy") == 2
    found[:] = [GOOD]
    assert "Nothing is wrong." in run().stdout


def test_long_lines_are_wrapped_under_their_own_column() -> None:
    out = io.StringIO()
    print_findings([Finding("memory", "ok", "word " * 60)], Console(file=out, width=80, soft_wrap=True))
    lines = [line for line in out.getvalue().splitlines() if "word" in line]
    assert len(lines) > 3
    assert len({line.index("word") for line in lines}) == 1
    assert max(map(len, lines)) <= 80


def test_the_disk_of_the_given_folder_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(doctor, "examine", lambda out: asked.append(out) or [GOOD])
    run("--out", str(tmp_path / "runs"))
    run()
    assert asked == [tmp_path / "runs", None]
    result = run("--out", "")
    assert result.exit_code == 2
    assert '--out="" is empty' in result.stderr


def test_help_states_the_exit_code_and_the_command_is_listed_after_gpus() -> None:
    assert "Exit code" in run("--help").stdout
    names = list(COMMANDS)
    assert names.index("doctor") == names.index("gpus") + 1


def test_plain_data_holds_the_worst_verdict() -> None:
    assert findings_dict([GOOD, WARNING])["verdict"] == "warning"
    assert findings_dict([GOOD])["findings"][0] == {
        "topic": "disk", "verdict": "ok", "text": "Roomy.", "remedy": "", "facts": {"free_bytes": 5},
    }  # fmt: skip
