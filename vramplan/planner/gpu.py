"""What a card has: the catalogue of ``gpus.toml``, peak arithmetic rates, and the arithmetic of a memory budget."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ..errors import ConfigError, Problem
from ..units import GIB, MIB, gib
from .evidence import NO_EVIDENCE, Evidence

DESKTOP_RESERVE_BYTES = 3 * GIB // 4
"""Assumed for a desktop on a card that may drive a screen: 0.75 GiB. A browser can take several times as much."""

TENSOR_RATES = {
    # dense bfloat16 or float16 FLOP per SM and clock with float32 accumulation, from the architecture whitepapers;
    # GeForce cards run it at half the rate of the professional ones on the same chip
    ("geforce", "turing"): 512,
    ("geforce", "ampere"): 512,
    ("geforce", "ada"): 512,
    ("geforce", "blackwell"): 512,
    ("professional", "turing"): 1024,
    ("professional", "ampere"): 1024,
    ("professional", "ada"): 1024,
    ("professional", "blackwell"): 1024,
    ("datacenter", "turing"): 1024,
    ("datacenter", "ampere"): 1024,
    ("datacenter", "ada"): 1024,
    ("datacenter", "hopper"): 4096,
}
TENSOR_RATES_BY_CAPABILITY = {(8, 0): 2048, (10, 0): 8192}
"""Chips made for datacenters that share an architecture's name but not its tensor cores: A100 and B200."""

FLOAT32_LANES = {(7, 5): 64, (8, 0): 64}
"""float32 lanes per SM; 128 on every other card here. Each does a multiply and an add per clock."""

_ARCHITECTURES = {
    (7, 5): "turing",
    (8, 0): "ampere",
    (8, 6): "ampere",
    (8, 9): "ada",
    (9, 0): "hopper",
    (10, 0): "blackwell",
    (12, 0): "blackwell",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card. ``usable_bytes`` is what torch reports on Linux; ``usable_measured`` says whether somebody saw it.

    ``boost_mhz`` is the rated boost clock. ``datasheet_flops`` (dense, half precision, float32 accumulation) wins over
    the rule SMs x boost x ``tensor_rate`` where the maker prints one. ``context_bytes`` (CUDA context) and
    ``workspace_bytes`` (one cuBLAS workspace) are what the user measured, if he did: see ``overheads.py``. ``evidence``
    is by how much estimates were wrong on this architecture.
    """

    name: str
    total_bytes: int
    usable_bytes: int
    usable_measured: bool
    sms: int
    boost_mhz: int
    bandwidth_bytes_per_second: float
    capability: tuple[int, int]
    market: str
    laptop: bool
    source: str
    tensor_rate: int
    datasheet_flops: float | None = None
    context_bytes: int | None = None
    workspace_bytes: int | None = None
    evidence: Evidence = NO_EVIDENCE

    @property
    def architecture(self) -> str:
        """``turing``, ``ampere``, ``ada``, ``hopper`` or ``blackwell``."""
        return _ARCHITECTURES[self.capability]

    @property
    def supports_bf16(self) -> bool:
        """Whether the tensor cores know bfloat16 (compute capability 8.0 and later)."""
        return self.capability >= (8, 0)

    @property
    def drives_screen(self) -> bool:
        """Whether a desktop may be holding part of the memory: never on a datacenter card."""
        return self.market != "datacenter"

    def peak_flops(self, dtype: str) -> float:
        """Peak dense FLOP/s for ``bfloat16``, ``float16``, ``tf32`` or ``float32``.

        Raises ConfigError for a dtype that the card's tensor cores do not have, and for an unknown one.
        """
        if dtype in ("bfloat16", "tf32") and not self.supports_bf16:
            rule = f"needs compute capability 8.0; the {self.name} has {'.'.join(map(str, self.capability))}"
            raise ConfigError(Problem("dtype", dtype, rule, "use float16 (with loss scaling) or float32"))
        if dtype in ("bfloat16", "float16"):
            return half_flops(self)
        if dtype == "tf32":
            return tf32_flops(self)
        if dtype == "float32":
            return float32_flops(self)
        raise ConfigError(Problem("dtype", dtype, "is not a dtype", "use bfloat16, float16, tf32 or float32"))


def half_flops(gpu: Gpu) -> float:
    """Dense FLOP/s in bfloat16 or float16 with float32 accumulation: the datasheet's figure, or else the rule's."""
    return gpu.datasheet_flops or half_flops_by_rule(gpu)


def half_flops_by_rule(gpu: Gpu) -> float:
    """SMs x rated boost x tensor FLOP per SM and clock."""
    return gpu.sms * gpu.boost_mhz * 1e6 * gpu.tensor_rate


def tf32_flops(gpu: Gpu) -> float:
    """Half of the bfloat16 rate: TF32 operands are twice as wide (Ampere whitepaper)."""
    return half_flops(gpu) / 2


def float32_flops(gpu: Gpu) -> float:
    """SMs x float32 lanes x 2 x rated boost, without tensor cores."""
    return gpu.sms * FLOAT32_LANES.get(gpu.capability, 128) * 2 * gpu.boost_mhz * 1e6


def kept_by_driver(total_bytes: int) -> int:
    """Bytes of nvidia-smi's total that torch never sees on Linux, where nobody measured it: 380 MiB + 0.5 %.

    Within 63 MiB of these, seen with CUDA 12.8 drivers (in MiB): RTX 2080 414, 3060 378, 4060 375, 4090 487, 5070 464,
    5080 463, 5090 494, T4 447, L4 471, A100 40GB 583. Drivers before 2024 kept about 150 MiB less, and a B200 keeps
    570 MiB less than the rule says; what was seen of a card is in gpus.toml and wins.
    """
    return 380 * MIB + total_bytes // 200


@cache
def load_gpus() -> tuple[Gpu, ...]:
    """Every card in the catalogue, in its order."""
    text = resources.files(__package__).joinpath("gpus.toml").read_text(encoding="utf-8")
    return tuple(_gpu(group, card) for group in tomllib.loads(text)["group"] for card in group["cards"])


def _gpu(group: dict[str, Any], card: dict[str, Any]) -> Gpu:
    capability = (group["capability"][0], group["capability"][1])
    family_rate = TENSOR_RATES_BY_CAPABILITY.get(capability)
    if family_rate is None:
        family_rate = TENSOR_RATES[(group["market"], _ARCHITECTURES[capability])]
    total_bytes = card["total_mib"] * MIB
    measured = "usable_mib" in card
    return Gpu(
        name=card["name"],
        total_bytes=total_bytes,
        usable_bytes=card["usable_mib"] * MIB if measured else total_bytes - kept_by_driver(total_bytes),
        usable_measured=measured,
        sms=card["sms"],
        boost_mhz=card["boost_mhz"],
        bandwidth_bytes_per_second=card["bandwidth_gbps"] * 1e9,
        capability=capability,
        market=group["market"],
        laptop=group.get("laptop", False),
        source=f"{group['source']}; usable: {card['seen']}" if measured else group["source"],
        tensor_rate=card.get("tensor_rate", family_rate),
        datasheet_flops=card["tflops"] * 1e12 if "tflops" in card else None,
    )


_SIZE = re.compile(r"(\d+)\s*gi?b\b|(?<![a-z\d])(\d+)\s*g\b")
_REWRITES = (
    # the many ways to say "laptop" and "SXM", as NVML, shops and people write them
    (re.compile(r"\b(?:mobile|notebook|max-?\s?q)\b"), "laptop"),
    (re.compile(r"\bsxm\d?\b|\bhbm3e?\b"), "sxm"),
)
_SHORT = {"s": {"super"}, "ts": {"ti", "super"}, "tis": {"ti", "super"}}
_NOISE = frozenset({
    "nvidia", "geforce", "tesla", "rtx", "gpu", "graphics", "card",
    "generation", "design", "with", "edition", "founders", "workstation",
})  # fmt: skip
_FORM_FACTORS = frozenset({"sxm", "pcie"})
_SIZE_TOLERANCE = 0.08
"""nvidia-smi shows up to 7 % less than the size on the box where error correction takes its share (L4: 22.5 of 24)."""


def _words(name: str) -> tuple[frozenset[str], float | None]:
    """Split a card's name into its telling words and the memory size in GiB that it mentions, if any."""
    text = name.lower().replace("(tm)", " ").replace("(r)", " ").replace("_", " ")
    for pattern, word in _REWRITES:
        text = pattern.sub(word, text)
    size = _SIZE.search(text)
    if size is not None:
        text = text[: size.start()] + " " + text[size.end() :]
    words = frozenset(re.findall(r"\d+|[a-z]+", text)) - _NOISE
    return words, float(size.group(1) or size.group(2)) if size is not None else None


def find_gpu(name: str, *, total_bytes: int | None = None) -> Gpu:
    """Find a card by what people call it: ``4070``, ``rtx4070ti``, ``NVIDIA GeForce RTX 4070 Laptop GPU``, ``a100``.

    A bare number means the desktop card. Where a name fits two memory sizes (``3060``), a size in it (``3060 8GB``) or
    ``total_bytes`` of the live card decides, and otherwise the one that is listed first in gpus.toml: the more common
    one. Raises ConfigError with the nearest names for a card that is not in the catalogue.
    """
    words, size = _words(name)
    long_form = frozenset().union(*(_SHORT.get(word, {word}) for word in words))
    for wanted in (words, long_form):
        fits = [gpu for gpu in load_gpus() if wanted in (known := _words(gpu.name)[0], known - _FORM_FACTORS)]
        if size is not None:
            fits = [gpu for gpu in fits if _is_size(gpu, size)]
        if fits and total_bytes is not None:
            live = total_bytes
            return min(fits, key=lambda gpu: abs(gpu.total_bytes - live))
        if fits:
            return fits[0]
    squashed = [gpu for gpu in load_gpus() if _plain(gpu.name) == _plain(name)]
    if squashed:
        return squashed[0]
    bare = [number for number in words if size is None and number.isdigit() and len(words) > 1]
    for number in bare:  # "a100 80": the size without its unit
        fits = [gpu for gpu in _containing(words - {number}) if _is_size(gpu, float(number))]
        if fits:
            return fits[0]
    more = [gpu for gpu in _containing(long_form) if not gpu.laptop and (size is None or _is_size(gpu, size))]
    if len(more) == 1:  # "pro 6000"
        return more[0]
    names = [gpu.name for gpu in _containing(long_form)][:6] or _similar(name)
    rule = "may mean several cards" if more else "is not in the catalogue"
    raise ConfigError(Problem("gpu", name, rule, f"nearest: {', '.join(names)}; see `vramplan gpus`"))


def _containing(words: frozenset[str]) -> list[Gpu]:
    """Cards whose name has all these words and perhaps more."""
    if not any(word.isdigit() for word in words):
        return []
    return [gpu for gpu in load_gpus() if words <= _words(gpu.name)[0]]


def _is_size(gpu: Gpu, gibibytes: float) -> bool:
    return abs(gpu.total_bytes / GIB / gibibytes - 1) <= _SIZE_TOLERANCE


def _similar(name: str) -> list[str]:
    known = {_plain(gpu.name): gpu.name for gpu in load_gpus()}
    return [known[near] for near in difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.0)]


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|gpu|\s", "", name.lower())


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many bytes a run may take: ``total_bytes - reserve_bytes``; ``assumptions`` are sentences for the user."""

    total_bytes: int
    reserve_bytes: int
    assumptions: tuple[str, ...] = ()

    @property
    def budget_bytes(self) -> int:
        """What is left for the run."""
        return self.total_bytes - self.reserve_bytes


def budget(
    gpu: Gpu | None,
    *,
    vram_bytes: int | None = None,
    reserve_bytes: int | None = None,
    free_bytes: int | None = None,
    headless: bool = False,
) -> Budget:
    """Work out the memory budget, in bytes, and say what was assumed.

    The total is ``vram_bytes`` if given, else ``free_bytes`` (what NVML says is free on the live card now), else the
    card's usable bytes. Without ``reserve_bytes`` nothing is kept back in the first two cases, on a datacenter card or
    with ``headless``; on a named card that may drive a screen, DESKTOP_RESERVE_BYTES is. Raises ConfigError when
    nothing says how large the card is, when the reserve is negative, and when it leaves nothing.
    """
    notes: list[str] = []
    if vram_bytes is not None:
        total, default_reserve = vram_bytes, 0
        if gpu is not None and total > gpu.total_bytes:
            notes.append(f"{gib(total)} is more than the {gpu.name} has: {gib(gpu.usable_bytes)} can be used of it.")
        if reserve_bytes is None:
            notes.append(f"All {gib(total)} given with --vram taken as available; --reserve keeps some back.")
    elif free_bytes is not None:
        total, default_reserve = free_bytes, 0
        notes.append(f"{gib(total)} is free on the card now; whatever else starts later takes from it.")
    elif gpu is not None:
        total, default_reserve = gpu.usable_bytes, DESKTOP_RESERVE_BYTES if gpu.drives_screen and not headless else 0
        if not gpu.usable_measured:
            notes.append(
                f"{gib(total)} usable on the {gpu.name} is derived from its {gib(gpu.total_bytes)}, not measured; "
                "--vram replaces it."
            )
        if default_reserve and reserve_bytes is None:
            kept = f"{default_reserve / GIB:g} GiB"
            notes.append(f"{kept} assumed for the desktop; --reserve changes it, --headless means none.")
    else:
        raise ConfigError(Problem("gpu", "none", "leaves the budget unknown", "name a card with --gpu, or give --vram"))
    reserve = default_reserve if reserve_bytes is None else reserve_bytes
    if reserve < 0:
        raise ConfigError(Problem("reserve", gib(reserve), "must not be negative"))
    if reserve >= total:
        rule = f"leaves nothing of {gib(total)}"
        raise ConfigError(Problem("reserve", gib(reserve), rule, "reserve less, or use a larger card"))
    return Budget(total_bytes=total, reserve_bytes=reserve, assumptions=tuple(notes))
