"""Checkpoints: complete, atomic, verified, and never code."""

from __future__ import annotations

import os
import struct
import zipfile

import pytest
import torch

from vramplan.errors import DataError, VramplanError
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.trainer import checkpoint as module
from vramplan.trainer.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    all_finite,
    archive_damage,
    load,
    plain_state_dict,
    rng_state,
    set_rng_state,
)
from vramplan.trainer.model import GPT

SHAPE = Shape(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=16)
STEP = StepConfig(dtype="float32", loss="full", device="cpu")


def make(step: int = 250) -> Checkpoint:
    model = GPT(SHAPE, STEP, seed=step)
    return Checkpoint(
        step=step,
        tokens_seen=step * 64,
        model=plain_state_dict(model),
        optimizer={"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1}]},
        scaler={},
        data={"position": step * 4, "block_size": 16, "seed": 1, "fingerprint": "f"},
        rng=rng_state(),
        config_toml="[model]\n",
        last_loss=4.5,
        best_val_loss=None,
    )


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


def test_everything_comes_back(folder):
    saved = make()
    path = folder.save(saved)
    assert path.name == "step-000250.pt"
    found = load(path)
    assert (found.step, found.tokens_seen, found.best_val_loss) == (250, 16000, None)
    assert found.data == saved.data
    assert found.config_toml == saved.config_toml
    assert found.optimizer["param_groups"] == [{"lr": 0.1}]
    for name, tensor in saved.model.items():
        assert torch.equal(found.model[name], tensor)
        assert found.model[name].device.type == "cpu"


def test_the_random_generator_continues(folder):
    path = folder.save(make())
    expected = torch.rand(5)
    set_rng_state(load(path).rng)
    assert torch.equal(torch.rand(5), expected)


def test_the_newest_are_kept_by_number_not_by_name(folder):
    for step in (2, 30, 999_999, 1_000_000):
        folder.save(make(step))
    assert [p.name for p in folder.paths()] == ["step-1000000.pt", "step-999999.pt"]
    assert folder.newest()[1].step == 1_000_000


def test_what_was_just_written_is_never_removed(folder):
    for step in (300, 200):
        folder.save(make(step)).write_bytes(b"x")
    path = folder.save(make(150))
    assert path.is_file()
    assert folder.newest()[1].step == 150


def test_a_damaged_one_set_aside_does_not_count(folder):
    for step in (10, 20):
        folder.save(make(step))
    damaged = folder.paths()[0]
    damaged.write_bytes(b"x")
    assert folder.set_aside(damaged).read_bytes() == b"x"
    folder.save(make(15))
    assert [p.name for p in folder.paths()] == ["step-000015.pt", "step-000010.pt"]


def test_what_a_killed_process_left_is_swept_away(folder):
    folder.save(make())
    (folder.directory / ".step-000300.pt.tmp").write_bytes(b"half written when the machine died")
    folder.sweep()
    assert [p.name for p in folder.directory.iterdir()] == ["step-000250.pt"]


@pytest.mark.parametrize(("entry", "value"), [("step", "ten"), ("model", [1]), ("config_toml", 3), ("rng", None)])
def test_a_wrong_entry_is_named(folder, entry, value):
    path = folder.save(make())
    payload = torch.load(path, weights_only=True)
    torch.save({**payload, entry: value}, path)
    with pytest.raises(DataError, match=f"has a wrong entry '{entry}'"):
        load(path)
    torch.save({k: v for k, v in payload.items() if k != entry}, path)
    with pytest.raises(DataError, match=f"has no entry '{entry}'"):
        load(path)


def test_weights_that_are_not_numbers_are_noticed():
    model = torch.nn.Linear(3, 3)
    assert all_finite(model)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.weight[1, 1] = value
        assert not all_finite(model)


def test_no_checkpoint_is_none(folder):
    assert folder.newest() is None


def test_a_temporary_file_is_no_checkpoint(folder):
    folder.save(make())
    (folder.directory / ".step-000300.pt.tmp").write_bytes(b"half written when the machine died")
    assert folder.newest()[1].step == 250


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "not an archive"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(folder, damage):
    folder.save(make(10))
    newest = folder.save(make(20))
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "one bit":
        with zipfile.ZipFile(newest) as archive:
            largest = max(archive.infolist(), key=lambda i: i.file_size)
        content[largest.header_offset + largest.file_size // 2] ^= 1
    else:
        content = bytearray(b"not an archive")
    newest.write_bytes(content)
    skipped = []
    path, found = folder.newest(lambda p, reason: skipped.append((p, reason)))
    assert found.step == 10
    assert path.name == "step-000010.pt"
    assert [p for p, _ in skipped] == [newest]
    assert "is damaged" in skipped[0][1]


def test_every_flipped_byte_of_a_weight_is_noticed(folder):
    path = folder.save(make())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    name_bytes, extra_bytes = struct.unpack_from("<HH", content, info.header_offset + 26)
    start = info.header_offset + 30 + name_bytes + extra_bytes
    for offset in range(start, start + info.file_size, info.file_size // 20):
        flipped = bytearray(content)
        flipped[offset] ^= 0x10
        path.write_bytes(flipped)
        assert archive_damage(path), offset


def test_when_all_are_damaged_each_is_named(folder):
    for step in (10, 20):
        folder.save(make(step)).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        folder.newest()
    assert "step-000010.pt" in str(caught.value)
    assert "step-000020.pt" in str(caught.value)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_with_code_is_refused_and_not_run(folder, tmp_path):
    folder.directory.mkdir()
    path = folder.directory / "step-000001.pt"
    torch.save({"format": 1, "step": Bomb(tmp_path / "it-ran")}, path)
    with pytest.raises(DataError, match="is refused: it holds more than tensors"):
        folder.newest()
    assert not (tmp_path / "it-ran").exists()


def test_another_programs_archive_is_no_checkpoint(tmp_path):
    torch.save({"model": torch.ones(2)}, tmp_path / "step-000001.pt")
    with pytest.raises(DataError, match="is not a vramplan checkpoint"):
        load(tmp_path / "step-000001.pt")


def test_a_failed_write_keeps_the_older_checkpoint_and_leaves_nothing_behind(folder, monkeypatch):
    older = folder.save(make(10))

    def disk_full(payload, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", disk_full)
    with pytest.raises(VramplanError, match=r"No space left.*newest checkpoint before it is .*step-000010\.pt"):
        folder.save(make(20))
    assert list(folder.directory.iterdir()) == [older]


def test_what_cannot_be_read_back_never_gets_its_name(folder, monkeypatch):
    folder.save(make(10))
    monkeypatch.setattr(module.torch, "save", lambda payload, f: f.write(b"the disk lost it"))
    with pytest.raises(VramplanError, match="reading it back failed"):
        folder.save(make(20))
    assert folder.newest()[1].step == 10


def test_a_compiled_model_is_saved_under_plain_names():
    model = GPT(SHAPE, STEP)
    assert plain_state_dict(torch.compile(model, backend="eager")).keys() == model.state_dict().keys()
