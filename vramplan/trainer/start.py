"""What can be known to be wrong before anything is tokenised, written or put on a GPU, and which shards a run means."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import Collector, ConfigError, DataError, Problem, command
from ..planner.step import DeviceKind
from ..runconfig import RunConfig
from .data import check_data, default_folder, prepare
from .events import OnEvent, ignore
from .parquet import find_sources
from .rundir import RunDirectory
from .shards import Manifest, ShardSet
from .tokenizer import N_RANKS, load_tokenizer

N_VOCAB = N_RANKS + 1


def torch_device(kind: DeviceKind, field: str) -> torch.device:
    """The device of this kind. Raises ConfigError, naming ``field``, when this torch cannot use it."""
    if kind == "cuda" and not torch.cuda.is_available():
        built = f"torch {torch.__version__} finds no CUDA device"
        remedy = f"{built}: use the CPU (vramplan plan --gpu cpu), or install a CUDA build of torch"
        raise ConfigError(Problem(field, "cuda", "is not available", remedy))
    return torch.device(kind)


def check_start(config: RunConfig, run_dir: Path, *, resume: bool, data: str | None) -> None:
    """Raise ConfigError with every problem that would stop this run later; changes nothing."""
    collect = Collector()
    if config.step.workload != "vramplan":
        rule = "is another script's memory, not this trainer's"
        collect.problems.append(Problem("step.workload", config.step.workload, rule, 'use workload = "vramplan"'))
    with collect:
        torch_device(config.step.device, "step.device")
    if config.step.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        remedy = 'pip install "vramplan[8bit]", or use adamw-fused'
        collect.problems.append(Problem("step.optimizer", "adamw8bit", "needs bitsandbytes", remedy))
    with collect:
        RunDirectory(run_dir).check(config, resume=resume)
    if data is None and not resume:
        collect.problems.append(Problem("--data", "missing", "is required", "name the Parquet files"))
    if data is not None:
        with collect:
            check_data(data, config.data.text_column, N_VOCAB, config.model.vocab_size)
    collect.finish()


def open_shards(
    config: RunConfig, run_dir: Path, *, resume: bool, data: str | None, folder: Path | None, on_event: OnEvent = ignore
) -> ShardSet:
    """The shards for this run: its own when it is resumed and they are still there, else made from ``data``.

    ``folder`` is where they are or shall be; by default where the run last found them, else beside the run. Raises
    DataError when shards or files are not those of the run, or are gone and ``data`` does not say how to make them.
    """
    run = RunDirectory(run_dir)
    last: dict[str, Any] = (run.sessions() or [{}])[-1]
    problems: list[Problem] = []
    if resume:
        found, problems = _shards_of_run(run, last, config, data, folder)
        if found is not None:
            return found
    if data is None:
        source = str(last.get("data_source") or "FILE.parquet")
        again = command("vramplan", "train", "--resume", run.path, "--data", source)
        raise DataError([*problems, Problem("--data", "missing", "is required", f"tokenise again with: {again}")])
    tokenizer, block_size = load_tokenizer(), config.model.block_size
    folder = folder or default_folder(data, run_dir, tokenizer, config.data, block_size)
    shards = prepare(
        data, folder, tokenizer, config.data, config.model.vocab_size, block_size=block_size, on_event=on_event
    )
    if resume and last.get("data_fingerprint") not in (None, shards.manifest.fingerprint):
        raise DataError(_another(data, str(last.get("data_source") or "other text")))
    return shards


def _another(data: str, source: str) -> Problem:
    rule = f"is not the data of this run, which was {source}"
    return Problem("--data", data, rule, "leave --data out, or start a new run")


def _places(run: RunDirectory, session: dict[str, Any]) -> list[Path]:
    """Where the shards of a run may be: where they were, or beside it after both have been moved."""
    if "data_manifest" not in session:
        return []
    recorded = Path(str(session["data_manifest"])).parent
    return list(dict.fromkeys((recorded, run.path.parent / "shards" / recorded.name)))


def _shards_of_run(
    run: RunDirectory, session: dict[str, Any], config: RunConfig, data: str | None, folder: Path | None
) -> tuple[ShardSet | None, list[Problem]]:
    """Undamaged shards with the tokens the run was trained on; or None, and why there are none."""
    problems: list[Problem] = []
    for place in [folder] if folder else _places(run, session):
        try:
            shards = ShardSet.open(place)
        except DataError as error:
            problems += error.problems
            continue
        if session.get("data_fingerprint") not in (None, shards.manifest.fingerprint):
            problems.append(Problem("shards", str(place), "holds other tokens than those the run was trained on"))
        elif damage := shards.verify():
            problems += damage
        elif data is not None and not _same_files(data, config.data.text_column, shards.manifest):
            raise DataError(_another(data, shards.manifest.source or "another"))
        else:
            return shards, []
    if not problems and run.facts.exists():
        problems = [Problem("run_dir", str(run.facts), "does not say which shards the run used")]
    return None, problems


def _same_files(data: str, column: str, manifest: Manifest) -> bool:
    """Whether the Parquet files are those of the manifest by name, size and rows; a copy has another time."""
    if manifest.source == os.path.abspath(os.path.expanduser(data)):
        return True
    return manifest.files == [(s.path.name, s.size_bytes, s.rows) for s in find_sources(data, column)]
