"""What ``PYTORCH_ALLOC_CONF`` says, as far as the replay knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, Problem, did_you_mean
from ..units import MIB

LARGE_SEGMENT = 20 * MIB
"""Where requests of 1 to 10 MiB come from; no block below it is ever oversize."""

UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """What ``PYTORCH_ALLOC_CONF`` sets, and how much may be reserved.

    ``cap_bytes`` is what the driver has to give, or the share of it that ``set_per_process_memory_fraction`` allows.
    torch looks at ``garbage_collection_threshold`` (a share of the cap; 0 is off) only when such a share is set.
    """

    expandable_segments: bool = False
    max_split_bytes: int = UNLIMITED
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: int = 1
    large_segment_bytes: int = LARGE_SEGMENT
    cap_bytes: int = UNLIMITED

    @property
    def plain(self) -> bool:
        """Whether nothing is set but a cap and the size of large segments."""
        plain = AllocatorSettings(cap_bytes=self.cap_bytes, large_segment_bytes=self.large_segment_bytes)
        return self == plain

    @classmethod
    def parse(cls, text: str, cap_bytes: int = UNLIMITED) -> AllocatorSettings:
        """Read ``expandable_segments:True,max_split_size_mb:128``. Raises ConfigError for what is not modelled."""
        values: dict[str, Any] = {}
        problems = []
        for entry in filter(None, (part.strip() for part in text.split(","))):
            key, _, value = (part.strip() for part in entry.partition(":"))
            try:
                name, convert = SETTINGS[key]
                values[name] = convert(value)
            except KeyError:
                rule = "is not an allocator setting that the replay knows"
                problems.append(Problem("alloc_conf", entry, rule, did_you_mean(key, list(SETTINGS))))
            except ValueError as error:
                problems.append(Problem("alloc_conf", entry, str(error)))
        split, segment = values.get("max_split_bytes", UNLIMITED), values.get("large_segment_bytes", LARGE_SEGMENT)
        if not problems and split < segment:
            rule = "must not be below large_segment_size_mb"
            problems.append(Problem("alloc_conf", text, rule, f"use at least {segment // MIB}"))
        if problems:
            raise ConfigError(problems)
        return cls(cap_bytes=cap_bytes, **values)


def _flag(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError("must be True or False")
    return text == "True"


def _more_than(least_mib: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) <= least_mib:
            raise ValueError(f"must be a whole number above {least_mib}")
        return int(text) * MIB

    return convert


def _threshold(text: str) -> float:
    value = float(text) if text.isascii() and text.replace(".", "", 1).isdigit() else 0.0
    if not 0 < value < 1:
        raise ValueError("must lie between 0 and 1")
    return value


def _divisions(text: str) -> int:
    if text not in ("1", "2", "4", "8", "16", "32", "64"):
        raise ValueError("must be a power of 2 up to 64")
    return int(text)


SETTINGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "expandable_segments": ("expandable_segments", _flag),
    "max_split_size_mb": ("max_split_bytes", _more_than(LARGE_SEGMENT // MIB)),
    "garbage_collection_threshold": ("garbage_collection_threshold", _threshold),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "large_segment_size_mb": ("large_segment_bytes", _more_than(LARGE_SEGMENT // MIB - 1)),
}  # fmt: skip
"""What the replay knows of torch's settings: the field of each, and how its value is read."""
