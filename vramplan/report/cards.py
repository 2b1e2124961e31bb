"""The catalogue, for a person or a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..planner.gpu import Gpu
from ..planner.speed import efficiency
from ..units import GIB, MIB
from .console import console


def card_dict(gpu: Gpu) -> dict[str, Any]:
    """One card as plain data: bytes, FLOP/s, bytes per second."""
    return {
        "name": gpu.name,
        "market": gpu.market,
        "laptop": gpu.laptop,
        "architecture": gpu.architecture,
        "capability": list(gpu.capability),
        "total_bytes": gpu.total_bytes,
        "usable_bytes": gpu.usable_bytes,
        "usable_measured": gpu.usable_measured,
        "sms": gpu.sms,
        "boost_mhz": gpu.boost_mhz,
        "bandwidth_bytes_per_second": gpu.bandwidth_bytes_per_second,
        "peak_flops": {dtype: rate for dtype, rate in _rates(gpu).items() if rate is not None},
        "source": gpu.source,
    }


def _rates(gpu: Gpu) -> dict[str, float | None]:
    halves = ("bfloat16", "float16", "tf32") if gpu.supports_bf16 else ("float16",)
    return {dtype: gpu.peak_flops(dtype) for dtype in (*halves, "float32")}


def print_cards(gpus: Sequence[Gpu], out: Console | None = None) -> None:
    """The whole catalogue as a table."""
    table = Table(title=f"{len(gpus)} cards", caption="~ derived, not measured", title_justify="left", box=None)
    for name in ("card", "memory MiB", "usable MiB", "half TFLOPS", "GB/s", "sm"):
        table.add_column(name, justify="left" if name == "card" else "right")
    for gpu in gpus:
        table.add_row(
            gpu.name,
            f"{gpu.total_bytes / MIB:.0f}",
            f"{'' if gpu.usable_measured else '~'}{gpu.usable_bytes / MIB:.0f}",
            f"{gpu.peak_flops('float16') / 1e12:.1f}",
            f"{gpu.bandwidth_bytes_per_second / 1e9:.0f}",
            f"{gpu.capability[0]}.{gpu.capability[1]}",
        )
    (out or console()).print(table)


def print_card(gpu: Gpu, out: Console | None = None) -> None:
    """One card with where its figures come from."""
    out = out or console()
    out.print(f"[bold]{gpu.name}[/] ({gpu.architecture}, sm_{gpu.capability[0]}{gpu.capability[1]}, {gpu.market})")
    how = "measured" if gpu.usable_measured else "derived, not measured"
    out.print(
        f"  memory     {gpu.total_bytes / GIB:.2f} GiB, of which torch can use {gpu.usable_bytes / GIB:.2f} GiB ({how})"
    )
    out.print(f"  compute    {gpu.sms} SMs at {gpu.boost_mhz} MHz rated boost")
    for dtype, rate in _rates(gpu).items():
        out.print(f"  {dtype:<10} {(rate or 0) / 1e12:.1f} TFLOPS dense")
    out.print(f"  bandwidth  {gpu.bandwidth_bytes_per_second / 1e9:.0f} GB/s")
    reached = efficiency(gpu)
    shares = f"matmul {reached.matmul:.2f}, attention {reached.attention:.2f}, bandwidth {reached.bandwidth:.2f}"
    out.print(f"  reached    {shares} of rated\n             {reached.source}")
    out.print(f"  source     {gpu.source}", highlight=False)
