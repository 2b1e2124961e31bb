"""The house stands: arrows point down, planning never meets torch, and user input is never asserted."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vramplan

PACKAGE = Path(vramplan.__file__).parent
REPOSITORY = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "pyarrow", "tiktoken", "optuna", "transformers", "bitsandbytes")


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after importing these in a fresh interpreter."""
    program = "import importlib, sys\nfor m in sys.argv[1:]: importlib.import_module(m)\nprint(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in shown.stdout.split()}


def test_import_contracts_are_kept() -> None:
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_planning_never_imports_torch() -> None:
    planner = [module_name(path) for path in SOURCES if "planner" in path.parts]
    assert len(planner) > 5
    loaded = loaded_by(*planner, "vramplan.runconfig", "vramplan.device", "vramplan.units", "vramplan.errors")
    assert loaded.isdisjoint(HEAVY)
    assert loaded.isdisjoint({"rich", "click", "pynvml"})


def test_the_command_line_and_its_planning_half_start_without_torch() -> None:
    if not (PACKAGE / "cli").exists() and not (PACKAGE / "cli.py").exists():
        pytest.skip("there is no command line yet")
    assert loaded_by("vramplan.cli").isdisjoint((*HEAVY, "pydantic"))
    if (PACKAGE / "cli" / "planning.py").exists():
        assert loaded_by("vramplan.cli.planning").isdisjoint(HEAVY)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_assert_statements(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_exceptions_that_a_user_meets_live_in_one_place() -> None:
    elsewhere = []
    for path in SOURCES:
        if path.name == "errors.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                # a bare BaseException is control flow, which no user meets
                if any(base.endswith(("Error", "Exception")) for base in bases - {"BaseException"}):
                    elsewhere.append(f"{module_name(path)}.{node.name}")
    assert elsewhere == []


def test_the_version_is_the_projects() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert vramplan.__version__ == project["version"]
