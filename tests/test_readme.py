"""The commands of README.md and docs/memory-model.md run, and print what is shown there.

Blocks after ``<!-- run -->`` (or ``<!-- run: CODE -->`` for a command that must fail) are executed in order in one
directory. ``python tests/test_readme.py`` rewrites the transcripts with what the commands print now.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
PAGES = [README, README.parent / "docs/memory-model.md"]
BLOCK = re.compile(
    r"<!-- run(?:: (?P<code>\d))? -->\n```console\n\$ (?P<command>[^\n]+)\n(?P<output>.*?)```", re.DOTALL
)
TIMING = re.compile(r"searched in \d+ m?s")


def normal(text: str) -> str:
    lines = [line.rstrip() for line in TIMING.sub("searched in 300 ms", text).splitlines()]
    return "\n".join(lines).strip()


def transcript(command: str, directory: Path) -> tuple[int, str]:
    words = shlex.split(command)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "VRAMPLAN_LEDGER": str(directory / "none.sqlite")}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=directory,
        capture_output=True,
        encoding="utf-8",
        env=environment,
        check=False,
    )
    return done.returncode, normal(done.stdout + done.stderr)


def with_examples(directory: Path) -> Path:
    """A directory that has what the commands name."""
    shutil.copytree(README.parent / "examples", directory / "examples", ignore=shutil.ignore_patterns("*.py", "__*"))
    return directory


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_prints_what_is_shown(tmp_path, page):
    with_examples(tmp_path)
    blocks = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    assert len(blocks) >= (4 if page == README else 1)
    for block in blocks:
        code, output = transcript(block["command"], tmp_path)
        assert code == int(block["code"] or 0), output
        assert output == normal(block["output"]), block["command"]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with_examples(Path(folder))

        def fill(block: re.Match[str]) -> str:
            _, output = transcript(block["command"], Path(folder))
            note = f": {block['code']}" if block["code"] else ""
            return f"<!-- run{note} -->\n```console\n$ {block['command']}\n{output}\n```"

        for page in PAGES:
            page.write_text(BLOCK.sub(fill, page.read_text(encoding="utf-8")), encoding="utf-8")
