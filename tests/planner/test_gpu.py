"""The catalogue agrees with datasheets and measurements, forgives spellings, and budgets say what they assume."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vramplan.errors import ConfigError
from vramplan.planner.gpu import (
    DESKTOP_RESERVE_BYTES,
    Gpu,
    budget,
    find_gpu,
    half_flops,
    half_flops_by_rule,
    kept_by_driver,
    load_gpus,
)
from vramplan.units import GIB, MIB

PUBLISHED_BF16_TFLOPS = {
    "RTX 3060": 25.5, "RTX 3090": 71.2, "RTX 4060 Ti": 44.1, "RTX 4070": 58.3, "RTX 4070 SUPER": 71.0,
    "RTX 4070 Ti": 80.2, "RTX 4070 Ti SUPER": 88.2, "RTX 4080": 97.5, "RTX 4090": 165.2, "RTX 5070": 61.7,
    "RTX 5070 Ti": 87.9, "RTX 5080": 112.6, "RTX 5090": 209.5, "L4": 121, "L40S": 362, "A100": 312,
    "H100 SXM": 989, "H200": 989, "H100 PCIe": 756,
}  # fmt: skip
PUBLISHED_GB_PER_SECOND = {
    "RTX 3060": 360, "RTX 3090": 936, "RTX 4070": 504, "RTX 4070 Ti SUPER": 672, "RTX 4090": 1008, "RTX 5070": 672,
    "RTX 5090": 1792, "A100 40GB": 1555, "A100 80GB": 2039, "H100": 3350, "H200": 4800,
}  # fmt: skip
SEEN_BY_NVIDIA_SMI_MIB = {
    "RTX 4070": 12282, "RTX 3060": 12288, "RTX 4090": 24564, "RTX 5070": 12227, "RTX 5090": 32607, "H200": 143771,
}  # fmt: skip
SEEN_BY_TORCH_MIB = {
    "RTX 4070": (11994, 11994), "RTX 3060": (11910, 12045), "RTX 4090": (24077, 24217), "RTX 5080": (15840, 15840),
    "RTX 5060 Ti 16GB": (15848, 15848), "T4": (14913, 15110), "L4": (22563, 22693), "A100 40GB": (40377, 40514),
}  # fmt: skip

EVERY_CARD = pytest.mark.parametrize("gpu", load_gpus(), ids=lambda g: g.name)


@pytest.mark.parametrize(("name", "tflops"), PUBLISHED_BF16_TFLOPS.items())
def test_peak_half_precision_rate_is_the_published_one(name: str, tflops: float) -> None:
    assert find_gpu(name).peak_flops("bfloat16") / 1e12 == pytest.approx(tflops, rel=0.02)


@pytest.mark.parametrize(("name", "gb_per_second"), PUBLISHED_GB_PER_SECOND.items())
def test_bandwidth_is_the_published_one(name: str, gb_per_second: float) -> None:
    assert find_gpu(name).bandwidth_bytes_per_second / 1e9 == pytest.approx(gb_per_second, rel=0.02)


@EVERY_CARD
def test_rule_from_clock_and_sms_confirms_the_datasheet(gpu: Gpu) -> None:
    assert half_flops_by_rule(gpu) == pytest.approx(half_flops(gpu), rel=0.02)


@pytest.mark.parametrize(("name", "mib"), SEEN_BY_NVIDIA_SMI_MIB.items())
def test_total_is_what_nvidia_smi_shows(name: str, mib: int) -> None:
    assert find_gpu(name).total_bytes == mib * MIB


@pytest.mark.parametrize(("name", "mib"), SEEN_BY_TORCH_MIB.items())
def test_usable_memory_is_a_measured_one_where_there_is_one(name: str, mib: tuple[int, int]) -> None:
    gpu = find_gpu(name)
    assert gpu.usable_measured
    assert mib[0] * MIB <= gpu.usable_bytes <= mib[1] * MIB


@EVERY_CARD
def test_usable_memory_is_a_little_less_than_the_total(gpu: Gpu) -> None:
    assert 0.89 * gpu.total_bytes < gpu.usable_bytes < gpu.total_bytes
    if not gpu.usable_measured:
        assert gpu.usable_bytes == gpu.total_bytes - kept_by_driver(gpu.total_bytes)


@EVERY_CARD
def test_derived_share_of_the_driver_is_never_far_below_a_measured_one(gpu: Gpu) -> None:
    if gpu.usable_measured and gpu.total_bytes < 100 * GIB:
        assert gpu.total_bytes - gpu.usable_bytes - kept_by_driver(gpu.total_bytes) < 40 * MIB


@EVERY_CARD
def test_every_card_is_found_by_its_own_name_and_by_the_name_nvml_gives_it(gpu: Gpu) -> None:
    assert find_gpu(gpu.name) is gpu
    prefix = "NVIDIA GeForce " if gpu.market == "geforce" else "NVIDIA "
    suffix = " GPU" if gpu.laptop else ""
    assert find_gpu(prefix + gpu.name + suffix) is gpu


@EVERY_CARD
def test_every_card_says_where_its_figures_come_from(gpu: Gpu) -> None:
    assert gpu.source
    assert gpu.market in ("geforce", "professional", "datacenter")
    assert gpu.architecture in ("turing", "ampere", "ada", "hopper", "blackwell")


def test_the_catalogue_covers_the_usual_cards() -> None:
    names = {gpu.name for gpu in load_gpus()}
    assert len(names) == len(load_gpus()) >= 45
    assert sum(gpu.laptop for gpu in load_gpus()) >= 15
    assert {"RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB", "RTX 3080 10GB", "RTX 3080 12GB", "H100 NVL", "B200"} <= names


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("4070", "RTX 4070"),
        ("rtx4070", "RTX 4070"),
        ("geforce-rtx-4070", "RTX 4070"),
        ("4070ti", "RTX 4070 Ti"),
        ("RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("4070s", "RTX 4070 SUPER"),
        ("4070 ti s", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop"),
        ("4080 mobile", "RTX 4080 Laptop"),
        ("GeForce RTX 2080 with Max-Q Design", "RTX 2080 Laptop"),
        ("3060", "RTX 3060 12GB"),
        ("3060 8gb", "RTX 3060 8GB"),
        ("RTX 3060 8GB", "RTX 3060 8GB"),
        ("4060ti16gb", "RTX 4060 Ti 16GB"),
        ("a100", "A100 SXM 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("H200 141GB", "H200"),
        ("L4 24GB", "L4"),
        ("l40s", "L40S"),
        ("a10g", "A10G"),
        ("Tesla T4", "T4"),
        ("A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_spellings_are_forgiven(spelling: str, name: str) -> None:
    assert find_gpu(spelling).name == name


def test_the_live_cards_memory_tells_two_sizes_of_one_name_apart() -> None:
    assert find_gpu("NVIDIA GeForce RTX 4060 Ti", total_bytes=16380 * MIB).name == "RTX 4060 Ti 16GB"
    assert find_gpu("NVIDIA GeForce RTX 3060", total_bytes=8192 * MIB).name == "RTX 3060 8GB"


@pytest.mark.parametrize("name", ["RTX 4075", "4070 9gb", "rx 7900", ""])
def test_an_unknown_card_is_refused_with_the_nearest_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not in the catalogue.*`vramplan gpus`") as caught:
        find_gpu(name)
    if "407" in name:
        assert "RTX 4070" in str(caught.value)


def test_turing_has_no_bfloat16_and_no_tf32() -> None:
    turing = find_gpu("2080 ti")
    assert not turing.supports_bf16
    assert turing.peak_flops("float16") == pytest.approx(53.8e12, rel=0.02)
    for dtype in ("bfloat16", "tf32"):
        with pytest.raises(ConfigError, match="use float16"):
            turing.peak_flops(dtype)


def test_tf32_is_half_of_bfloat16_and_float32_does_without_tensor_cores() -> None:
    ada = find_gpu("4070")
    assert ada.peak_flops("tf32") == ada.peak_flops("bfloat16") / 2
    assert ada.peak_flops("float32") == pytest.approx(29.15e12, rel=0.01)
    assert find_gpu("a100").peak_flops("float32") == pytest.approx(19.5e12, rel=0.01)
    with pytest.raises(ConfigError, match="is not a dtype"):
        ada.peak_flops("int8")


def test_a_card_that_may_drive_a_screen_keeps_something_for_the_desktop_and_says_so() -> None:
    found = budget(find_gpu("4070"))
    assert found.reserve_bytes == DESKTOP_RESERVE_BYTES == 805306368
    assert found.budget_bytes == 11994 * MIB - DESKTOP_RESERVE_BYTES
    assert found.assumptions == ("0.75 GiB assumed for the desktop; --reserve changes it, --headless means none.",)


def test_a_headless_or_datacenter_card_keeps_nothing() -> None:
    assert budget(find_gpu("4070"), headless=True).budget_bytes == 11994 * MIB
    assert budget(find_gpu("T4")).reserve_bytes == 0


def test_a_derived_size_is_announced() -> None:
    (sentence,) = budget(find_gpu("4070 super"), headless=True).assumptions
    assert "derived" in sentence
    assert "RTX 4070 SUPER" in sentence


def test_given_memory_replaces_the_cards_and_keeps_nothing_back_unless_told() -> None:
    given = budget(find_gpu("4070"), vram_bytes=9 * GIB, free_bytes=GIB)
    assert (given.total_bytes, given.reserve_bytes) == (9 * GIB, 0)
    assert "--vram" in given.assumptions[0]
    told = budget(None, vram_bytes=9 * GIB, reserve_bytes=GIB)
    assert told.budget_bytes == 8 * GIB
    assert told.assumptions == ()


def test_free_memory_of_the_live_card_is_the_budget() -> None:
    live = budget(find_gpu("4070"), free_bytes=9 * GIB)
    assert live.budget_bytes == 9 * GIB
    assert "free" in live.assumptions[0]
    assert budget(find_gpu("4070"), free_bytes=9 * GIB, reserve_bytes=GIB).budget_bytes == 8 * GIB


@pytest.mark.parametrize("reserve", [-1, 12 * GIB])
def test_a_reserve_that_leaves_nothing_or_is_negative_is_refused(reserve: int) -> None:
    with pytest.raises(ConfigError, match="reserve="):
        budget(find_gpu("4070"), reserve_bytes=reserve)


def test_a_budget_needs_a_card_or_a_size() -> None:
    with pytest.raises(ConfigError, match="--vram"):
        budget(None)


def test_the_catalogue_loads_without_heavy_imports() -> None:
    program = (
        "import sys, vramplan.planner.gpu as g; g.load_gpus(); "
        "print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "card"),
    [("a100 80", "A100 SXM 80GB"), ("pro 6000", "RTX PRO 6000 Blackwell"), ("quadro rtx 6000", "Quadro RTX 6000")],
)
def test_short_names_that_mean_one_card(name, card):
    assert find_gpu(name).name == card


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtx 6000", ["several cards", "Quadro RTX 6000", "RTX 6000 Ada", "RTX PRO 6000 Blackwell"]),
        ("4070 8gb", ["RTX 4070 Laptop"]),
        ("xyz", ["nearest: "]),
    ],
)
def test_names_that_do_not_mean_one_card_list_the_nearest(name, words):
    with pytest.raises(ConfigError) as caught:
        find_gpu(name)
    for word in words:
        assert word in str(caught.value)
