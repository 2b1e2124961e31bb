"""Quantities are read strictly, GiB and GB are never mixed, and what is printed reads well."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.errors import ConfigError
from vramplan.units import GIB, count, duration, gib, parse_bytes, parse_count, parse_time


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("12GB", 12_000_000_000),
        ("12GiB", 12 * 2**30),
        ("8.9GiB", int(8.9 * 2**30)),
        ("11994MiB", 11994 * 2**20),
        ("11,994 MiB", 11994 * 2**20),
        (" 512 kib ", 512 * 1024),
        ("1_000MB", 10**9),
        ("1e3MB", 10**9),
        ("7B", 7),
        ("2TiB", 2 * 2**40),
        ("0GiB", 0),
    ],
)
def test_bytes_with_a_unit(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


def test_gib_is_seven_percent_more_than_gb() -> None:
    assert parse_bytes("12GiB") / parse_bytes("12GB") == pytest.approx(1.0737, abs=1e-4)


@pytest.mark.parametrize("text", ["12", "8.9", "12e9"])
def test_bare_number_is_refused_and_both_readings_are_offered(text: str) -> None:
    with pytest.raises(ConfigError, match="has no unit") as caught:
        parse_bytes(text, "--vram")
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("--vram", text)
    assert f"{text}GiB" in problem.remedy
    assert f"{text}GB" in problem.remedy


@pytest.mark.parametrize("text", ["12G", "12GiBs", "5parsec"])
def test_unknown_unit_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown unit {text.lstrip('0123456789')}"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "nanGiB", "infGB", "12 GiB free", "1.2.3GiB", "0x10GiB"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize("parse", [parse_bytes, parse_count])
@pytest.mark.parametrize("number", ["8,9", "12,34", "1,2345", "1,"])
def test_decimal_comma_is_not_taken_for_thousands(parse, number: str) -> None:
    with pytest.raises(ConfigError):
        parse(f"{number}GiB" if parse is parse_bytes else f"{number}M")


@pytest.mark.parametrize("text", ["1e999", "9" * 40])
def test_absurd_numbers_are_refused_not_crashed_on(text: str) -> None:
    with pytest.raises(ConfigError, match="beyond"):
        parse_count(text)
    with pytest.raises(ConfigError, match="beyond"):
        parse_bytes(text + "GiB")


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("125M", 125_000_000),
        ("1.5B", 1_500_000_000),
        ("2.5e9", 2_500_000_000),
        ("524288", 524_288),
        ("524,288", 524_288),
        ("300k", 300_000),
        ("1.1M", 1_100_000),
        ("1T", 10**12),
    ],
)
def test_counts(text: str, n: int) -> None:
    assert parse_count(text) == n


@pytest.mark.parametrize("text", ["", "0", "0.4", "-1", "1.5", "125MB", "lots", "12 5"])
def test_what_is_not_a_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_count(text, "--params")
    assert caught.value.problems[0].field == "--params"


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=2**52))
def test_plain_counts_are_read_exactly(n: int) -> None:
    assert parse_count(str(n)) == n
    assert parse_count(f"{n:,}") == n
    assert parse_bytes(f"{n}B") == n


@settings(deadline=None)
@given(st.integers(min_value=GIB // 10 + 1, max_value=2**50))
def test_a_printed_size_can_be_read_back(n: int) -> None:
    assert abs(parse_bytes(gib(n)) - n) <= 0.0051 * GIB


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (12_558_041_088, "11.70 GiB"),
        (16 * 1024 * 50304 * 2, "1.54 GiB"),
        (12_000_000_000, "11.18 GiB"),
        (8_519_680, "8.1 MiB"),
        (512, "0.5 KiB"),
        (0, "0.00 GiB"),
        (-3 * GIB, "-3.00 GiB"),
    ],
)
def test_sizes_are_shown_in_binary_units(n_bytes: int, shown: str) -> None:
    assert gib(n_bytes) == shown


def test_digits_of_a_size_can_be_chosen() -> None:
    assert gib(16 * 1024 * 50304 * 2, digits=3) == "1.535 GiB"


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (124_373_760, "124.4M"),
        (1_557_611_200, "1.56B"),
        (999, "999"),
        (999_950, "1.0M"),
        (524_288, "524.3k"),
        (10**12, "1.0T"),
        (0, "0"),
    ],
)
def test_counts_are_shown_short(n: int, shown: str) -> None:
    assert count(n) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0123, "12 ms"),
        (3.839, "3.8 s"),
        (75, "75 s"),
        (5025, "84 min"),
        (7200, "2.0 h"),
        (36_000, "10.0 h"),
        (5 * 86_400, "5.0 days"),
        (float("inf"), "n/a"),
        (float("nan"), "n/a"),
    ],
)
def test_durations_read_well(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2026-11-21", "2026-11-21T00:00:00+00:00"),
        ("2026-11-21T00:30:00+01:00", "2026-11-20T23:30:00+00:00"),
        ("2026-11-21 09:30", "2026-11-21T09:30:00+00:00"),
        ("2026-11-21T09:30:00Z", "2026-11-21T09:30:00+00:00"),
    ],
)
def test_times_are_read_in_utc(text: str, shown: str) -> None:
    assert parse_time(text).isoformat() == shown


@pytest.mark.parametrize("text", ["", "soon", "21.11.2026", "2026-02-30", "0001-01-01T00:00+14:00"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--before=.* is not a date: write it as 2026-11-21"):
        parse_time(text, "--before")
