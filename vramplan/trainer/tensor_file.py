"""A nested structure of tensors and plain values as one safetensors file: free of code, and with sums of its bytes.

The tensors go to the file one after another, so that saving needs host memory for a single one. Their names are their
paths (``optimizer.state.3.exp_avg``); the structure around them is JSON in the file's metadata. One more tensor holds
CRC-32 sums: of the header, then of each tensor in the order of their data. Any reader of safetensors can open it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DataError, Problem

SUMS = "crc32"
"""Name of the tensor that holds the sums."""
STRUCTURE = "structure"
LARGEST_HEADER = 16_000_000
"""Bytes; a model of a thousand layers takes a tenth of it. The format itself would allow 100 MB."""

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Tree = dict[str, Any]

_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, struct.error)
"""What reading a header or a structure raises that says something else than it should."""


def write_tree(file: IO[bytes], tree: Tree) -> None:
    """Write tensors, numbers, words, None, lists, tuples and dictionaries of those. TypeError for anything else.

    A tensor that occurs twice is written once.
    """
    found: dict[str, Tensor] = {}
    structure = _described(tree, (), found, {})
    # wider ones first: every tensor then lies at a multiple of its element's size
    names = sorted(found, key=lambda name: -found[name].element_size())
    header: dict[str, Any] = {"__metadata__": {STRUCTURE: json.dumps(structure)}}
    end = 0
    for name in names:
        t = found[name]
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    sums_bytes = 4 * (len(names) + 1)
    header[SUMS] = {"dtype": "U8", "shape": [sums_bytes], "data_offsets": [end, end + sums_bytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    sums = [zlib.crc32(text)]
    for name in names:
        data = _bytes_of(found[name])
        file.write(data)
        sums.append(zlib.crc32(data))
    file.write(struct.pack(f"<{len(sums)}I", *sums))


def read_tree(path: Path) -> Tree:
    """What :func:`write_tree` wrote, tensors on the CPU. Raises DataError for damage and for another program's file."""
    try:
        damage = damage_of(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if STRUCTURE not in metadata and SUMS not in file.keys():  # noqa: SIM118 - not a dictionary
                raise DataError(Problem("checkpoint", str(path), "is not a vramplan checkpoint"))
            if damage:
                raise DataError(Problem("checkpoint", str(path), f"is damaged ({damage})"))
            # copied out of the mapped file, which may be removed while they are in use
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        tree = _restored(json.loads(metadata[STRUCTURE]), tensors)
    except SafetensorError as error:
        raise DataError(Problem("checkpoint", str(path), f"is damaged ({damage or error})")) from None
    except _DAMAGE as error:
        rule = f"is damaged (its structure cannot be read: {type(error).__name__})"
        raise DataError(Problem("checkpoint", str(path), rule)) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(Problem("checkpoint", str(path), f"cannot be read ({reason})")) from None
    if not isinstance(tree, dict):
        raise DataError(Problem("checkpoint", str(path), "is damaged (its structure is none)"))
    return tree


def damage_of(path: Path) -> str:
    """What is wrong with a file by its own sums; empty when nothing is. Reads it once, 16 MiB at a time."""
    with path.open("rb") as file:
        try:
            text = _header(file)
            entries = json.loads(text)
            spans = sorted(
                (tuple(entry["data_offsets"]), name) for name, entry in entries.items() if name != "__metadata__"
            )
            (_, last) = spans.pop()
            if last != SUMS:
                return "it has no sums"
            sums = [zlib.crc32(text), *(_sum_of(file, end - start) for (start, end), _ in spans)]
            stored = file.read(4 * len(sums) + 1)
        except _DAMAGE as error:
            return f"its header cannot be read ({type(error).__name__})"
    if len(stored) != 4 * len(sums):
        return "it is cut off"
    wrong = [i for i, (now, then) in enumerate(zip(sums, struct.unpack(f"<{len(sums)}I", stored), strict=True))
             if now != then]  # fmt: skip
    if not wrong:
        return ""
    return f"checksum of {'its header' if wrong[0] == 0 else spans[wrong[0] - 1][1]} is wrong"


def _header(file: IO[bytes]) -> bytes:
    (n_bytes,) = struct.unpack("<Q", file.read(8))
    if n_bytes > LARGEST_HEADER:
        raise ValueError("no header is that long")
    return file.read(n_bytes)


def _sum_of(file: IO[bytes], n_bytes: int) -> int:
    total = 0
    while n_bytes > 0:
        piece = file.read(min(n_bytes, 16 << 20))
        if not piece:
            break
        total, n_bytes = zlib.crc32(piece, total), n_bytes - len(piece)
    return total


def _bytes_of(t: Tensor) -> memoryview:
    return t.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _described(value: Any, path: tuple[str, ...], found: dict[str, Tensor], names: dict[Any, str]) -> Any:
    """A value as JSON, tensors by their names; collects the tensors."""
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device) if value.numel() else path
        if key not in names:
            name = ".".join(path)
            while name in found:  # "a.b" and "b" inside "a"
                name += "_"
            names[key], found[name] = name, value
        return {"$tensor": names[key]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        pairs = [(k, _described(v, (*path, str(k)), found, names)) for k, v in value.items()]
        if all(type(k) is str and not k.startswith("$") for k, _ in pairs):
            return dict(pairs)
        return {"$pairs": [[_described(k, (*path, "key"), found, names), v] for k, v in pairs]}
    if isinstance(value, list | tuple):
        items = [_described(v, (*path, str(i)), found, names) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise TypeError(f"{'.'.join(path)} is a {type(value).__name__}, which cannot be saved")


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_restored(v, tensors) for v in value["$tuple"])
    if "$pairs" in value:
        return {_restored(k, tensors): _restored(v, tensors) for k, v in value["$pairs"]}
    return {k: _restored(v, tensors) for k, v in value.items()}


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Every tensor inside, as often as it occurs."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)
