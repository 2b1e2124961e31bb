"""Quantities as people write them: "125M" parameters, "11.7GiB" of memory; and back.

Inside the program bytes and counts are ``int``. GiB is 2**30 bytes, GB is 10**9 bytes; they are never mixed.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

from .errors import ConfigError, Problem

KIB, MIB, GIB = 2**10, 2**20, 2**30

_BYTES = {
    "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 2**40,
}  # fmt: skip
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = re.compile(
    # commas only between groups of three: "8,9GiB" is how half the world writes 8.9, and must not become 89
    r"\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*"
)
_LARGEST = 2**62


def parse_bytes(text: str, field: str = "size") -> int:
    """Parse ``"8.9GiB"`` or ``"12GB"`` into bytes. The unit is required: a bare number is ambiguous. Zero is a size.

    Raises ConfigError for anything else: no unit, an unknown one, a sign, a decimal comma.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ConfigError(Problem(field, text, "is not a size", "write a number and a unit, such as 11.7GiB or 12GB"))
    number, unit = match.groups()
    if unit.upper() not in _BYTES:
        rule = f"has the unknown unit {unit}" if unit else "has no unit"
        shown = number.strip()
        raise ConfigError(Problem(field, text, rule, f"write {shown}GiB (2**30 bytes) or {shown}GB (10**9 bytes)"))
    return int(_scaled(number, _BYTES[unit.upper()], field, text))


def parse_count(text: str, field: str = "count") -> int:
    """Parse ``"125M"``, ``"1.5B"``, ``"2.5e9"`` or ``"524288"`` into an integer. Raises ConfigError otherwise."""
    match = _NUMBER.fullmatch(text)
    if match is None or match.group(2).upper() not in _COUNTS:
        raise ConfigError(Problem(field, text, "is not a count", "write 125M, 1.5B or a plain number"))
    number, unit = match.groups()
    exact = _scaled(number, _COUNTS[unit.upper()], field, text)
    value = round(exact)
    if value <= 0:
        raise ConfigError(Problem(field, text, "must be at least 1"))
    if abs(exact - value) > 1e-9 * value:
        raise ConfigError(Problem(field, text, "is not a whole number", f"write {value}"))
    return value


def parse_time(text: str, field: str = "time") -> datetime:
    """Parse ``2026-11-21`` or ``2026-11-21T09:30:00+01:00``, in UTC where it names no zone; in UTC.

    Raises ConfigError for anything else.
    """
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):  # beyond the years 1 to 9999 once it is in UTC
        raise ConfigError(Problem(field, text, "is not a date", "write it as 2026-11-21")) from None


def _scaled(number: str, unit: int, field: str, text: str) -> float:
    value = float(number.replace(",", "").replace("_", "")) * unit
    if value > _LARGEST:
        raise ConfigError(Problem(field, text, "is beyond anything that exists"))
    return value


def gib(n_bytes: float, digits: int = 2) -> str:
    """``12558041088`` -> ``"11.70 GiB"``; sizes under 0.1 GiB in MiB, under 0.1 MiB in KiB."""
    unit, name, digits = _unit(n_bytes, digits)
    return f"{n_bytes / unit:.{digits}f} {name}"


def gib_needed(n_bytes: float, digits: int = 2) -> str:
    """As :func:`gib`, rounded up: who provides what is printed has enough."""
    unit, name, digits = _unit(n_bytes, digits)
    return f"{math.ceil(n_bytes / unit * 10**digits) / 10**digits:.{digits}f} {name}"


def _unit(n_bytes: float, digits: int) -> tuple[int, str, int]:
    if abs(n_bytes) >= 0.1 * GIB or n_bytes == 0:
        return GIB, "GiB", digits
    return (MIB, "MiB", 1) if abs(n_bytes) >= 0.1 * MIB else (KIB, "KiB", 1)


def count(n: float) -> str:
    """``124373760`` -> ``"124.4M"``."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(n) >= 0.9995 * size:
            digits = 2 if size == 10**9 else 1
            return f"{n / size:.{digits}f}{unit}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """``5025`` -> ``"84 min"``; whatever reads best from milliseconds to days, "n/a" when there is no end."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"
