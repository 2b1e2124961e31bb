"""One tree of errors; each message names field, value, rule and remedy, and all problems come at once."""

from __future__ import annotations

import os
import pickle
import shlex
from pathlib import Path

import pytest

from vramplan import errors
from vramplan.errors import (
    CapExceededError,
    ConfigError,
    DataError,
    DoesNotFitError,
    Problem,
    Stopped,
    TokenizerUnavailableError,
    VramplanError,
    command,
    did_you_mean,
)


def public_errors() -> dict[str, type[Exception]]:
    found = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, Exception)}


def test_the_exported_exceptions_are_the_tree_in_the_docstring() -> None:
    tree = [line.strip("│├└─ ").split() for line in (errors.__doc__ or "").splitlines() if "exit code" in line]
    assert {words[0]: int(words[3]) for words in tree} == {n: e.exit_code for n, e in public_errors().items()}
    assert set(public_errors()) == {
        "VramplanError", "ConfigError", "DataError", "DoesNotFitError", "CapExceededError",
        "TokenizerUnavailableError", "Stopped",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "parent"),
    [
        (VramplanError, Exception),
        (ConfigError, VramplanError),
        (DataError, ConfigError),
        (DoesNotFitError, VramplanError),
        (CapExceededError, VramplanError),
        (TokenizerUnavailableError, VramplanError),
        (Stopped, VramplanError),
    ],
)
def test_parents(kind: type, parent: type) -> None:
    assert kind.__bases__ == (parent,)


def test_one_problem_reads_as_one_sentence() -> None:
    error = ConfigError(Problem("n_head", 12, "does not divide 512", "use 8"), source="run.toml")
    assert str(error) == "run.toml: n_head=12 does not divide 512: use 8"
    assert error.source == "run.toml"


def test_all_problems_are_listed() -> None:
    problems = [Problem("batch_size", 0, "must be at least 1"), Problem("dtype", "bf16", "is unknown", "use bfloat16")]
    error = ConfigError(iter(problems))
    assert error.problems == tuple(problems)
    assert str(error).splitlines() == [
        "2 problems",
        "  * batch_size=0 must be at least 1",
        '  * dtype="bf16" is unknown: use bfloat16',
    ]


def test_a_missing_value_is_not_shown_as_one() -> None:
    assert str(Problem("--data", "missing", "is required", "name the files")) == "--data is required: name the files"


def test_data_errors_are_caught_as_config_errors() -> None:
    with pytest.raises(ConfigError):
        raise DataError(Problem("data", "x.parquet", "has no column text"))


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_an_error_survives_the_way_out_of_a_worker_process(kind: type[ConfigError]) -> None:
    error = kind([Problem("a", 1, "is wrong"), Problem("b", "x", "too", "fix it")], source="file")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.problems, copy.source, str(copy)) == (error.problems, error.source, str(error))


def test_a_stop_carries_its_signal_and_the_exit_code_of_a_shell() -> None:
    error = pickle.loads(pickle.dumps(Stopped("stopped", 15)))
    assert (str(error), error.signal_number, error.exit_code, Stopped.exit_code) == ("stopped", 15, 143, 128)


@pytest.mark.skipif(os.name == "nt", reason="its shell quotes in another way")
def test_a_command_is_quoted_for_the_shell() -> None:
    assert shlex.split(command("vramplan", Path("a b [1]'"))) == ["vramplan", "a b [1]'"]


def test_did_you_mean_names_the_nearest_or_else_everything() -> None:
    assert did_you_mean("compil", ["compile", "dtype"]) == "did you mean compile?"
    assert did_you_mean("zzz", ["compile", "dtype"]) == "known: compile, dtype"
