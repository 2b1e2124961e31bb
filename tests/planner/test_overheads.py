"""The figures beside the tensors have sources, follow the card and torch's release, and give way to measured ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from vramplan.cli import main
from vramplan.errors import ConfigError
from vramplan.planner.gpu import find_gpu, load_gpus
from vramplan.planner.memory import context_bytes, estimate, workspace_bytes
from vramplan.planner.overheads import (
    EVIDENCE,
    KINDS,
    MeasuredOverheads,
    Overhead,
    cublas_workspace_bytes,
    cuda_context_bytes,
    find_overhead,
    load_overheads,
    nccl_bytes,
    pinned_host_bytes,
    release,
    shipped_overheads,
)
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.units import MIB

SMALL = 8_519_680
SHAPE = Shape(n_layer=2, n_head=2, n_embd=64)
STEP = StepConfig(batch_size=2)


def name(entry: Overhead) -> str:
    return f"{entry.kind} {entry.capabilities}"


@pytest.mark.parametrize("entry", shipped_overheads(), ids=name)
def test_every_entry_says_where_it_is_from_and_how_good_it_is(entry: Overhead) -> None:
    assert entry.kind in KINDS
    assert entry.evidence in EVIDENCE
    assert re.search(r"github\.com|docs\.|\.cpp|\.h |pull request|wheel|MiB", entry.source), entry.source
    assert entry.figures
    assert all(size >= 0 for size in entry.figures.values())
    assert entry.until is None or entry.since < entry.until


def test_every_card_has_one_workspace_and_one_context() -> None:
    assert {entry.kind for entry in shipped_overheads()} == set(KINDS)
    for capability in {gpu.capability for gpu in load_gpus()}:
        for kind in ("cublas_workspace", "cuda_context"):
            for version in (None, (2, 11), (2, 12), (2, 13), (2, 15), (3, 0)):
                fits = [e for e in shipped_overheads() if e.kind == kind and e.holds(capability, version)]
                assert len(fits) == 1, (kind, capability, version)


@pytest.mark.parametrize(
    ("card", "version", "size"),
    [
        ("4070", None, SMALL),
        ("4070", "2.11.0", SMALL),
        ("A100 40GB", None, SMALL),
        ("H100 SXM", "2.11.0+cu130", 32 * MIB),
        ("H200", None, 32 * MIB),
        ("5090", "2.11.0", SMALL),
        ("5090", "2.12.0", 32 * MIB),
        ("5090", None, 32 * MIB),
        ("B200", "2.11.0", SMALL),
        ("B200", "2.15.0a0+git1234", 32 * MIB),
    ],
)
def test_the_workspace_follows_card_and_release(card: str, version: str | None, size: int) -> None:
    assert workspace_bytes(find_gpu(card), version) == size


def test_a_card_of_the_future_gets_the_newest_entry() -> None:
    assert cublas_workspace_bytes((13, 0)) == 32 * MIB
    assert find_overhead("cuda_context", (13, 0)).capabilities == ((10, 0),)


@pytest.mark.parametrize(
    ("card", "seen_mib", "first_product_mib"),
    [("T4", 141, 0), ("RTX 4070 SUPER", 200, 0), ("RTX 3090", 256, 20), ("RTX 6000 Ada", 426, 20)],
)
def test_contexts_that_were_seen(card: str, seen_mib: int, first_product_mib: int) -> None:
    assert context_bytes(find_gpu(card)) / MIB == pytest.approx(seen_mib + first_product_mib, abs=6)


def test_larger_cards_of_a_family_have_larger_contexts() -> None:
    assert context_bytes(find_gpu("4070")) == context_bytes(None) == 200 * MIB
    assert context_bytes(find_gpu("4090")) == (40 + 2.875 * 128) * MIB
    assert context_bytes(find_gpu("5090")) > context_bytes(find_gpu("5070"))
    for data_center, upper in (("A100 40GB", 420), ("H100 SXM", 520), ("B200", 560)):
        assert context_bytes(find_gpu(data_center)) == upper * MIB
    assert all(100 * MIB < cuda_context_bytes(gpu.capability, gpu.sms) < 700 * MIB for gpu in load_gpus())


def test_releases_are_read_and_nonsense_is_refused() -> None:
    assert release("2.13.0+cu130") == (2, 13)
    assert release("2.9") < release("2.15.0a0+git1234")
    with pytest.raises(ConfigError, match="is not a version"):
        release("nightly")


def test_pinned_batches_round_up_to_powers_of_two() -> None:
    assert pinned_host_bytes(8, 1024) == 2 * 8 * 8 * 1024
    assert pinned_host_bytes(12, 1024) == 2 * 128 * 1024
    assert pinned_host_bytes(1, 1) == 16


def test_nccl_takes_nothing_from_a_single_card() -> None:
    assert nccl_bytes(1) == nccl_bytes(1, communicators=3) == 0
    assert nccl_bytes(4, communicators=2) == 2 * nccl_bytes(2) == 2 * 688 * MIB


# ------------------------------------------------------------------- a user's own


def written(folder: Path, text: str) -> Path:
    path = folder / "overheads.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_was_measured_replaces_what_is_shipped(tmp_path: Path) -> None:
    card = find_gpu("5090")
    mine = load_overheads(written(tmp_path, "context_bytes = 400_000_000\ncublas_workspace_bytes = 0x400000\n"))
    assert mine == MeasuredOverheads(400_000_000, 4 * MIB)
    assert (context_bytes(mine.on(card)), workspace_bytes(mine.on(card), "2.11.0")) == (400_000_000, 4 * MIB)
    shipped, measured = estimate(SHAPE, STEP, card), estimate(SHAPE, STEP, mine.on(card))
    assert measured.breakdown["context"] == 400_000_000
    assert shipped.breakdown["workspace"] - measured.breakdown["workspace"] == 2 * (32 - 4) * MIB


def test_what_was_not_measured_stays_as_it_is_shipped(tmp_path: Path) -> None:
    card = find_gpu("4070")
    for path in (None, written(tmp_path, "")):
        assert load_overheads(path).on(card) == card
    one = load_overheads(written(tmp_path, "context_bytes = 0")).on(card)
    assert (context_bytes(one), workspace_bytes(one)) == (0, SMALL)
    assert one == replace(card, context_bytes=0)


def test_everything_wrong_with_a_file_is_one_error(tmp_path: Path) -> None:
    path = written(tmp_path, 'context_byte = 1\ncontext_bytes = -1\ncublas_workspace_bytes = "8 MB"\n')
    with pytest.raises(ConfigError) as caught:
        load_overheads(path)
    assert [problem.field for problem in caught.value.problems] == [
        "context_byte", "context_bytes", "cublas_workspace_bytes",
    ]  # fmt: skip
    assert str(caught.value).count("overheads.toml") == 3
    assert "did you mean context_bytes?" in str(caught.value)


@pytest.mark.parametrize("value", ["true", "1.5", "1_099_511_627_777", "[1]"])
def test_bytes_are_whole_and_believable(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a whole number of bytes"):
        load_overheads(written(tmp_path, f"context_bytes = {value}\n"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_overheads(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_overheads(written(tmp_path, "context_bytes = "))
    path = tmp_path / "latin.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        load_overheads(path)


def test_estimate_takes_the_file_and_needs_a_card_for_it(tmp_path: Path) -> None:
    shape = ["estimate", "--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--batch-size", "2"]
    given = [*shape, "--overheads", str(written(tmp_path, "context_bytes = 123_456_789"))]
    answer = CliRunner().invoke(main, [*given, "--gpu", "4070", "--json"])
    assert json.loads(answer.stdout)["breakdown"]["context"] == 123_456_789
    for card in ([], ["--gpu", "cpu"], ["--vram", "12GiB"]):
        refused = CliRunner().invoke(main, [*given, *card])
        assert (refused.exit_code, "means nothing without a card" in refused.stderr) == (2, True)
