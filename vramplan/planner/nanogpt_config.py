"""The configuration of a nanoGPT run, read without running it: a config/*.py, a command line, or a log's own words.

nanoGPT's configurator executes a Python file of assignments and then takes ``--name=value`` words. Here the file is
parsed, and only names bound to constants, or to arithmetic on them, are taken.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem
from .shape import GPT2_VOCAB, PADDED_GPT2_VOCAB, Shape
from .step import DeviceKind, StepConfig, check

DEFAULTS: Mapping[str, Any] = {
    "batch_size": 12, "block_size": 1024, "gradient_accumulation_steps": 40, "n_layer": 12, "n_head": 12,
    "n_embd": 768, "dropout": 0.0, "bias": False, "vocab_size": PADDED_GPT2_VOCAB, "learning_rate": 6e-4,
    "max_iters": 600_000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True,
    "warmup_iters": 2000, "lr_decay_iters": 600_000, "min_lr": 6e-5, "eval_interval": 2000, "eval_iters": 200,
    "log_interval": 1, "dtype": "bfloat16", "compile": True, "device": "cuda", "init_from": "scratch",
}  # fmt: skip
"""Those of nanoGPT's train.py; the vocabulary is that of its model where there is no meta.pkl."""

PRETRAINED = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
"""Layers, heads and width that ``init_from`` brings, with GPT-2's own vocabulary and biases."""

_ARITHMETIC: dict[type[ast.operator], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_NAMES = {"n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps", "init_from"}
_INTEGERS = tuple(name for name, value in DEFAULTS.items() if type(value) is int)


@dataclass(frozen=True)
class NanoGPTConfig:
    """What a run was told (``stated``), and with nanoGPT's defaults what it ran with (``settings``).

    ``world_size`` is the number of processes, among which nanoGPT divides the accumulation. ``notes`` say what was
    named and could not be read.
    """

    stated: Mapping[str, Any]
    world_size: int = 1
    notes: tuple[str, ...] = ()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting under nanoGPT's name."""
        brought: dict[str, Any] = {}
        if found := PRETRAINED.get(self.stated.get("init_from", "")):
            brought = dict(zip(("n_layer", "n_head", "n_embd"), found, strict=True))
            brought |= {"bias": True, "vocab_size": GPT2_VOCAB}
        return {**DEFAULTS, **self.stated, **brought}

    @property
    def shape(self) -> Shape:
        """The model's dimensions."""
        names = ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias")
        return Shape(**{name: self.settings[name] for name in names})

    @property
    def step(self) -> StepConfig:
        """One optimizer step of one process."""
        found = self.settings
        device: DeviceKind = "cpu" if str(found["device"]).startswith("cpu") else "cuda"
        return StepConfig(
            batch_size=found["batch_size"], grad_accum=max(1, found["gradient_accumulation_steps"] // self.world_size),
            dtype=found["dtype"], compile=found["compile"], loss="full",
            optimizer="adamw-fused" if device == "cuda" else "adamw-foreach", workload="nanogpt", device=device,
            dropout=float(found["dropout"]),
        )  # fmt: skip

    def check(self, source: str) -> None:
        """Raise ConfigError with everything that makes this configuration impossible."""
        found, problems = self.settings, []
        for name in _INTEGERS:
            if type(found[name]) is not int or found[name] < (name not in ("warmup_iters", "eval_iters")):
                problems.append(Problem(name, found[name], "must be a whole number of at least 1"))
        for name in ("bias", "compile"):
            if type(found[name]) is not bool:
                problems.append(Problem(name, found[name], "must be True or False"))
        if not isinstance(found["dropout"], int | float):
            problems.append(Problem("dropout", found["dropout"], "must be a number"))
        if not problems:
            problems = check(self.shape, self.step)
        if problems:
            raise ConfigError(problems, source=source)


def read_nanogpt(given: str | Path, *, near: Path | None = None) -> NanoGPTConfig:
    """The configuration in a Python file, or that of a command line such as ``train.py config/x.py --batch_size=8``.

    Configuration files that a command line names are looked for beside ``near`` and in the current directory. Raises
    ConfigError when a file cannot be read, when it says nothing about a model, or when what it says is impossible.
    """
    path = Path(given)
    if path.suffix == ".py" and " " not in str(given).strip():
        stated = assignments(_text(path), str(path))
        if not _NAMES & stated.keys():
            rule = "sets none of " + ", ".join(sorted(_NAMES))
            raise ConfigError(Problem("config", str(path), rule, "name nanoGPT's configuration file"))
        found = NanoGPTConfig(stated)
    else:
        found = command_line(str(given), near)
    found.check(str(given))
    return found


def command_line(text: str, near: Path | None = None) -> NanoGPTConfig:
    """What the words of a nanoGPT command line say; see :func:`read_nanogpt`."""
    try:
        words = shlex.split(text.strip().removeprefix("$ "))
    except ValueError:
        raise ConfigError(Problem("config", text, "has a quotation mark without its pair")) from None
    stated: dict[str, Any] = {}
    notes: list[str] = []
    processes = 1
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--nproc") and value.isdigit():
            processes = max(1, int(value))
        elif word.startswith("--") and equals:
            stated[name] = _literal(value)
        elif word.endswith(".py") and Path(word).name != "train.py":
            places = [folder / word for folder in (near, Path()) if folder is not None]
            path = next((place for place in places if place.is_file()), None)
            if path is None:
                notes.append(f"{word} was not found: nanoGPT's defaults stand for what it may set.")
            else:
                stated |= assignments(_text(path), str(path))
    if not stated and not notes:
        remedy = "name a file, or give nanoGPT's words: train.py --n_layer=12 --n_head=12 --n_embd=768"
        raise ConfigError(Problem("config", text, "is neither a file nor a command line of nanoGPT's", remedy))
    return NanoGPTConfig(stated, processes, tuple(notes))


def overrides_in(log: str) -> dict[str, Any]:
    """What a log says nanoGPT's configurator did: lines ``Overriding: batch_size = 16``."""
    found = re.findall(r"^.*?Overriding: (\w+) = (.+?)\s*$", log, re.MULTILINE)
    return {name: _literal(value) for name, value in found}


def assignments(source: str, name: str) -> dict[str, Any]:
    """Names that a Python file binds to constants or to arithmetic on them; nothing of it is run."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(Problem("config", name, "is not Python that can be read")) from None
    found: dict[str, Any] = {}
    for statement in body:
        targets: Iterable[ast.expr] = ()
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        for target in targets:
            if isinstance(target, ast.Name):
                constant = _constant(value, found)
                found.pop(target.id, None)  # what it was no longer holds, whatever it is now
                if constant is not None:
                    found[target.id] = constant
    return found


def _constant(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """The value of a constant expression, None for any other."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _constant(node.operand, known)
        return -inner if isinstance(inner, int | float) else None
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _constant(node.left, known), _constant(node.right, known)
        if isinstance(left, int | float) and isinstance(right, int | float):
            try:
                return _ARITHMETIC[type(node.op)](left, right)
            except (ArithmeticError, ValueError):
                return None
    return None


def _literal(text: str) -> Any:
    try:
        found = _constant(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        found = None
    return text.strip() if found is None else found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(Problem("config", str(path), "does not exist")) from None
    except (OSError, UnicodeDecodeError) as error:
        rule = f"cannot be read ({getattr(error, 'strerror', None) or 'it is not text'})"
        raise ConfigError(Problem("config", str(path), rule)) from None
