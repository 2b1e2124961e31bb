"""Memory of a training process besides its tensors: the sourced figures of ``overheads.toml``, in bytes.

What somebody measured on his own card is kept in a file of his (:func:`load_overheads`) and wins over the shipped one.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem, did_you_mean
from ..units import MIB
from .gpu import Gpu
from .step import Version, release

EVIDENCE = ("source code", "measured", "reported", "upper estimate")
KINDS = ("cublas_workspace", "autotune_buffer", "cuda_context", "triton_modules", "pinned_host", "nccl_communicator")

LARGEST_OVERHEAD_BYTES = 1 << 40
"""More than any card has."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """One entry of the file. ``since`` and ``until`` are torch releases, ``until`` the first without it.

    ``figures`` are the entry's own: ``bytes``, or what the functions below make bytes of.
    """

    kind: str
    capabilities: tuple[tuple[int, int], ...]
    since: Version
    until: Version | None
    evidence: str
    source: str
    figures: dict[str, float]

    def holds(self, capability: tuple[int, int] | None, version: Version | None) -> bool:
        """Whether it is about this card and release; None is the newest."""
        if self.capabilities and capability not in self.capabilities:
            return False
        if version is None:
            return self.until is None
        return self.since <= version and (self.until is None or version < self.until)


@cache
def shipped_overheads() -> tuple[Overhead, ...]:
    """Every entry of the shipped file, in its order."""
    text = resources.files(__package__).joinpath("overheads.toml").read_text(encoding="utf-8")
    return tuple(_entry(kind, dict(table)) for kind, tables in tomllib.loads(text).items() for table in tables)


def _entry(kind: str, table: dict[str, Any]) -> Overhead:
    return Overhead(
        kind=kind,
        capabilities=tuple((major, minor) for major, minor in table.pop("capabilities", ())),
        since=release(table.pop("since", "0.0")),
        until=release(table.pop("until")) if "until" in table else None,
        evidence=table.pop("evidence"),
        source=table.pop("source"),
        figures=table,
    )


def find_overhead(kind: str, capability: tuple[int, int] | None = None, torch_version: str | None = None) -> Overhead:
    """The entry for a card and a torch release, by default the newest.

    A card or a release that no entry is about gets the last one of its kind, which is the largest.
    """
    version = None if torch_version is None else release(torch_version)
    entries = [entry for entry in shipped_overheads() if entry.kind == kind]
    return next((entry for entry in entries if entry.holds(capability, version)), entries[-1])


def cublas_workspace_bytes(capability: tuple[int, int], torch_version: str | None = None) -> int:
    """Bytes of one cuBLAS workspace; a training process has two."""
    return int(find_overhead("cublas_workspace", capability, torch_version).figures["bytes"])


def autotune_buffer_bytes(capability: tuple[int, int], sms: int = 0, torch_version: str | None = None) -> int:
    """Bytes that a compiled run takes for a moment in its first step; without SMs, the most of that family."""
    entry = find_overhead("autotune_buffer", capability, torch_version).figures
    if "bytes" in entry:
        return int(entry["bytes"])
    most = entry["at_most_mib"]
    return int((min(most, entry["per_sm_mib"] * sms) if sms else most) * MIB)


def cuda_context_bytes(capability: tuple[int, int], sms: int = 0) -> int:
    """Bytes of the CUDA context of a card with so many SMs; without them, of the smaller ones of its family."""
    entry = find_overhead("cuda_context", capability).figures
    mib = max(entry["at_least_mib"], entry["base_mib"] + entry["per_sm_mib"] * sms)
    return int(mib * MIB)


def pinned_host_bytes(batch_size: int, block_size: int) -> int:
    """Bytes of host memory that one micro-batch pins: tokens and targets, each rounded up to a power of two.

    As many micro-batches as wait to be copied are held at once.
    """
    entry = find_overhead("pinned_host").figures
    one = int(entry["bytes_per_token"]) * batch_size * block_size
    return int(entry["tensors"]) * (1 << (one - 1).bit_length())


def nccl_bytes(world_size: int, communicators: int = 1) -> int:
    """Bytes of NCCL's buffers on each card: none for one card."""
    return 0 if world_size == 1 else communicators * int(find_overhead("nccl_communicator").figures["bytes"])


@dataclass(frozen=True, slots=True)
class MeasuredOverheads:
    """What was seen on one card, in bytes; None where nobody looked."""

    context_bytes: int | None = None
    cublas_workspace_bytes: int | None = None

    def on(self, gpu: Gpu) -> Gpu:
        """The card with these instead of the shipped figures."""
        return replace(gpu, context_bytes=self.context_bytes, workspace_bytes=self.cublas_workspace_bytes)


def load_overheads(path: Path | None) -> MeasuredOverheads:
    """A user's own figures: a TOML file with ``context_bytes`` or ``cublas_workspace_bytes`` or both; None: no file.

    Raises ConfigError with everything that is wrong with the file.
    """
    if path is None:
        return MeasuredOverheads()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(Problem("overheads", str(path), f"cannot be read: {error.strerror or error}")) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(Problem("overheads", str(path), f"is not TOML: {error}")) from error
    known = tuple(MeasuredOverheads.__dataclass_fields__)
    problems = []
    for name, value in table.items():
        if name not in known:
            problems.append(Problem(name, value, f"in {path} is not an overhead", did_you_mean(name, known)))
        elif type(value) is not int or not 0 <= value <= LARGEST_OVERHEAD_BYTES:
            rule = f"in {path} must be a whole number of bytes, 0 or more and at most 1 TiB"
            problems.append(Problem(name, value, rule))
    if problems:
        raise ConfigError(problems)
    return MeasuredOverheads(**table)
