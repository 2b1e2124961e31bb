"""The environment variables of torch's caching allocator: which the installed torch reads, and what they say.

torch renamed ``PYTORCH_CUDA_ALLOC_CONF`` to ``PYTORCH_ALLOC_CONF`` and now reads both. Which of them an installed torch
reads is looked up in its libraries, not guessed from its version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain

from ..errors import ConfigError, did_you_mean
from ..planner.allocator_settings import SETTINGS, AllocatorSettings
from .finding import Finding, Verdict, worst

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""In torch's order (c10/cuda/CUDAAllocatorConfig.h, ``instance``): the first that is set counts, even when it is empty.

Its documentation says that the new name wins; torch 2.11, 2.13 and 2.15 were given one bad and one good value, and
failed only when the bad one stood in the old name."""

NO_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING"

Libraries = Mapping[str, frozenset[str]]
"""What :func:`.machine.names_in_libraries` found."""

Part = tuple[Verdict, str, str]


def honoured(libraries: Libraries) -> tuple[str, ...]:
    """The variables that this torch reads, first the one that wins; empty when the libraries do not tell.

    The part for cards decides. A build without one still has the part that all devices share.
    """
    for library in ("c10_cuda", "c10_hip", "c10"):
        names = tuple(name for name in VARIABLES if name in libraries.get(library, ()))
        if names:
            return names
    return ()


def setting_names(environ: Mapping[str, str]) -> set[str]:
    """The names of all settings in all variables, as they are spelled there."""
    return set(chain.from_iterable(_settings(environ.get(name, "")) for name in VARIABLES)) - {""}


def variable_finding(libraries: Libraries) -> Finding:
    """Which variable to set."""
    names = honoured(libraries)
    facts = {"honoured": list(names), "libraries": {name: sorted(held) for name, held in sorted(libraries.items())}}
    if not names:
        why = "are not here" if not libraries else "hold none of the names"
        text = f"Which variable torch reads for its allocator is not known: its libraries {why}."
        remedy = f"if you need a setting, give {VARIABLES[0]} and {VARIABLES[2]} the same value"
        return Finding("allocator_variable", "unknown", text, remedy if libraries else "", facts)
    text = f"This torch reads {', '.join(names)}"
    text += "; the first that is set wins, even when it is empty." if len(names) > 1 else ", and no other name."
    return Finding("allocator_variable", "ok", text, "", facts)


def settings_finding(environ: Mapping[str, str], libraries: Libraries, platform: str) -> Finding:
    """What the variables say, whether torch hears it, and whether the plan knows it."""
    names = honoured(libraries)
    given = {name: environ[name] for name in VARIABLES if name in environ}
    effective = next((name for name in names if name in given), None)
    parts = list(_unheard(given, names, effective))
    for name in [effective] if effective else [] if names else given:
        parts += _said(name, given[name], libraries, platform)
    if NO_CACHE in environ:
        text = f"{NO_CACHE} is set: torch keeps no memory for reuse, which is slow and not what is planned."
        parts.append(("warning", text, f"unset {NO_CACHE}"))
    facts = {"given": given, "effective": effective}
    if not parts:
        return Finding("allocator_settings", "ok", "Nothing is set: torch's defaults, which plans assume.", "", facts)
    remedies = dict.fromkeys(remedy for _, _, remedy in parts if remedy)
    return Finding(
        "allocator_settings",
        worst(verdict for verdict, _, _ in parts),
        " ".join(text for _, text, _ in parts),
        "; ".join(remedies),
        facts,
    )


def _unheard(given: Mapping[str, str], names: tuple[str, ...], effective: str | None) -> list[Part]:
    """What is set and not read: under a name that torch does not know, or behind one that wins."""
    parts: list[Part] = []
    for name, value in given.items():
        if not names:
            parts.append(("unknown", f"{name} is set; whether this torch reads it is not known.", ""))
        elif name not in names:
            remedy = f"unset {name}" if effective else f"use the name {names[-1]}"
            parts.append(("warning", f'{name}="{value}" is not read by this torch, and does nothing.', remedy))
        elif effective is not None and value != given[effective]:
            text = f'{effective}="{given[effective]}" and {name}="{value}" disagree: torch takes the first.'
            parts.append(("warning", text, f"unset {effective} or {name}"))
    return parts


def _said(name: str, value: str, libraries: Libraries, platform: str) -> list[Part]:
    """What one variable says."""
    bad, foreign = _checked(value, libraries)
    parts: list[Part] = []
    if bad:
        remedy = f"correct {name} or unset it: torch can refuse it when the first tensor goes to the card"
        parts.append(("problem", f"{name}: {'; '.join(bad)}.", remedy))
    if foreign:
        text = f"{name} sets {', '.join(foreign)}, which plans do not know: reserved memory can differ from theirs."
        parts.append(("warning", text, "unset what you do not need, or keep some memory back: vramplan plan --reserve"))
    if not parts and "expandable_segments:True" in value.replace(" ", "") and platform == "win32":
        text = f"{name} sets expandable_segments, which torch does not have on Windows."
        parts.append(("warning", text, f"unset {name}"))
    elif not parts and value.strip():
        text = (
            f'{name}="{value}" is understood. Plans assume the defaults; to count it: vramplan estimate --alloc-conf.'
        )
        parts.append(("ok", text, ""))
    return parts


def _checked(value: str, libraries: Libraries) -> tuple[list[str], list[str]]:
    """What is wrong with a variable's text, and which settings torch may know though the planner does not."""
    bad: list[str] = []
    foreign: list[str] = []
    known = frozenset[str]().union(*libraries.values())
    complete = not libraries.keys().isdisjoint(("c10_cuda", "c10_hip"))  # without a card's part many are missing
    for name, entry in _settings(value).items():
        if name not in SETTINGS and name not in known and complete:
            bad.append(f'"{entry}" is known neither here nor to this torch: {did_you_mean(name, list(SETTINGS))}')
        elif name not in SETTINGS or "[" in entry:  # torch takes a list of sizes for roundup_power2_divisions
            foreign.append(entry)
        elif problem := _refused(entry):
            bad.append(problem)
    if not bad and not foreign and (problem := _refused(value)):
        bad.append(problem)
    return bad, foreign


def _refused(text: str) -> str:
    try:
        AllocatorSettings.parse(text)
    except ConfigError as error:
        return "; ".join(map(str, error.problems))
    return ""


def _settings(text: str) -> dict[str, str]:
    """``{name: the whole entry}``; commas inside brackets separate nothing."""
    entries = (entry.strip() for entry in re.split(r",(?![^\[]*\])", text))
    return {entry.partition(":")[0].strip(): entry for entry in entries if entry}
