"""Checkpoints: complete, atomic, verified, and never code."""

from __future__ import annotations

import json
import os
import struct
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from vramplan.errors import DataError, VramplanError
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.trainer import checkpoint as module
from vramplan.trainer.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    all_finite,
    load,
    plain_state_dict,
    rng_state,
    set_rng_state,
    step_of,
)
from vramplan.trainer.model import GPT
from vramplan.trainer.tensor_file import read_tree, write_tree

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


def write(path, tree):
    with path.open("wb") as f:
        write_tree(f, tree)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


def test_everything_comes_back(folder):
    saved = make()
    path = folder.save(saved)
    assert path.name == "step-000250.safetensors"
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
    assert [p.name for p in folder.paths()] == ["step-1000000.safetensors", "step-999999.safetensors"]
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
    assert [p.name for p in folder.paths()] == ["step-000015.safetensors", "step-000010.safetensors"]


def test_what_a_killed_process_left_is_swept_away(folder):
    folder.save(make())
    (folder.directory / ".step-000300.safetensors.tmp").write_bytes(b"half written when the machine died")
    folder.sweep()
    assert [p.name for p in folder.directory.iterdir()] == ["step-000250.safetensors"]


@pytest.mark.parametrize(("entry", "value"), [("step", "ten"), ("model", [1]), ("config_toml", 3), ("rng", None)])
def test_a_wrong_entry_is_named(folder, entry, value):
    path = folder.save(make())
    payload = read_tree(path)
    write(path, {**payload, entry: value})
    with pytest.raises(DataError, match=f"has a wrong entry '{entry}'"):
        load(path)
    write(path, {k: v for k, v in payload.items() if k != entry})
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
    (folder.directory / ".step-000300.safetensors.tmp").write_bytes(b"half written when the machine died")
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
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(b"not an archive")
    newest.write_bytes(content)
    skipped = []
    path, found = folder.newest(lambda p, reason: skipped.append((p, reason)))
    assert found.step == 10
    assert path.name == "step-000010.safetensors"
    assert [p for p, _ in skipped] == [newest]
    assert "is damaged" in skipped[0][1]


def test_every_flipped_byte_is_noticed(folder):
    """Of the length, the header, the weights and the sums: nowhere is a byte that may change unseen."""
    path = folder.save(make())
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    places = [*range(8), *range(8, 8 + header, 13), *range(8 + header, len(content), 997), *range(-8, 0)]
    for offset in places:
        flipped = bytearray(content)
        flipped[offset] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(DataError):
            load(path)
    path.write_bytes(content + b"x")
    with pytest.raises(DataError, match="is damaged"):
        load(path)
    path.write_bytes(content)
    assert load(path).step == 250


def test_when_all_are_damaged_each_is_named(folder):
    for step in (10, 20):
        folder.save(make(step)).write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        folder.newest()
    assert "step-000010.safetensors" in str(caught.value)
    assert "step-000020.safetensors" in str(caught.value)


def test_pickles_are_never_read(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    folder.directory.mkdir()
    torch.save({"format": 2, "step": Bomb()}, folder.directory / "step-000001.safetensors")
    with pytest.raises(DataError, match="is damaged"):
        folder.newest()
    assert not (tmp_path / "it-ran").exists()


def test_another_programs_file_is_no_checkpoint_and_not_called_damaged(tmp_path):
    path = tmp_path / "step-000001.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(DataError, match="is not a vramplan checkpoint"):
        load(path)


def test_other_programs_can_read_the_weights(folder):
    saved = make()
    found = load_file(folder.save(saved))
    for name, tensor in saved.model.items():
        assert torch.equal(found[f"model.{name}"], tensor)


def test_the_best_is_kept_beside_the_newest(folder):
    for step in (10, 20, 30, 40):
        folder.save(make(step), best_step=10)
    assert [step_of(path) for path in folder.paths()] == [40, 30, 10]
    folder.save(make(50), best_step=40)
    assert [step_of(path) for path in folder.paths()] == [50, 40]


@pytest.mark.parametrize(
    "tree",
    [
        {"a": torch.zeros(()), "b": [torch.ones(2, 3, dtype=torch.bfloat16), {"c": (1, 2.5, None, "word", True)}]},
        {"numbers": {0: torch.arange(5), 1: {"x": float("inf")}}, "empty": torch.zeros(0, 3)},
        {"transposed": torch.arange(6.0).view(2, 3).t(), "byte": torch.ones(3, dtype=torch.uint8)},
        {"flag": torch.ones(3) > 0, "wide": torch.ones(2)},
    ],
)  # fmt: skip
def test_any_structure_comes_back(tmp_path, tree):
    write(tmp_path / "file", tree)
    found = read_tree(tmp_path / "file")
    assert repr(found) == repr(tree)


def test_a_tensor_that_occurs_twice_is_written_once(tmp_path):
    shared = torch.randn(1000)
    write(tmp_path / "file", {"a": shared, "b": {"again": shared}})
    found = read_tree(tmp_path / "file")
    assert torch.equal(found["a"], shared)
    assert found["b"]["again"] is found["a"]
    assert (tmp_path / "file").stat().st_size < 6000


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.state is a set"):
        write(tmp_path / "file", {"optimizer": {"state": {1}}})


def test_a_failed_write_keeps_the_older_checkpoint_and_leaves_nothing_behind(folder, monkeypatch):
    older = folder.save(make(10))

    def disk_full(f, tree):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tree", disk_full)
    with pytest.raises(VramplanError, match=r"No space left.*checkpoint before it is .*step-000010\.safetensors"):
        folder.save(make(20))
    assert list(folder.directory.iterdir()) == [older]


def test_what_cannot_be_read_back_never_gets_its_name(folder, monkeypatch):
    folder.save(make(10))
    monkeypatch.setattr(module, "write_tree", lambda f, tree: f.write(b"the disk lost it"))
    with pytest.raises(VramplanError, match="reading it back failed"):
        folder.save(make(20))
    assert folder.newest()[1].step == 10


def test_a_compiled_model_is_saved_under_plain_names():
    model = GPT(SHAPE, STEP)
    assert plain_state_dict(torch.compile(model, backend="eager")).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "structure",
    ["", "[1]", "3", '{"$tensor": "model.wte"}', '{"a": {"$tensor": "gone"}}', '{"a": {"$tensor": [1]}}',
     '{"a": {"$pairs": 3}}', '{"a": {"$pairs": [[1, 2, 3]]}}', '{"a": {"$pairs": [[[1], 2]]}}', '{"a": {"$tuple": 1}}',
     "[" * 5000],
    ids=range(11),
)  # fmt: skip
def test_a_structure_that_makes_no_sense_is_damage(tmp_path, structure):
    """With the right sums: as a hand, not a disk, would change it."""
    path = tmp_path / "step-000001.safetensors"
    write(path, {"model": {"wte": torch.ones(3)}})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["structure"] = structure
    text = json.dumps(header).encode()
    data = content[8 + length : 8 + length + 12]
    sums = struct.pack("<2I", zlib.crc32(text), zlib.crc32(data))
    path.write_bytes(struct.pack("<Q", len(text)) + text + data + sums)
    with pytest.raises(DataError, match=r"is damaged|is not a vramplan checkpoint"):
        load(path)


def test_names_that_clash_are_kept_apart(tmp_path):
    write(tmp_path / "file", {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}})
    found = read_tree(tmp_path / "file")
    assert torch.equal(found["a.b"], torch.zeros(2))
    assert torch.equal(found["a"]["b"], torch.ones(2))
