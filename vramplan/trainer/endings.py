"""How a run ends that does not end well: with what is saved and how to go on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from ..errors import Stopped, VramplanError, command
from ..runconfig import RunConfig
from ..units import gib
from .checkpoint import CheckpointFolder
from .guard import HalfApplied
from .interrupt import StopAtOnce
from .memory_errors import out_of_memory
from .rundir import RunDirectory


@contextlib.contextmanager
def explained(run: RunDirectory, folder: CheckpointFolder, config: RunConfig) -> Iterator[None]:
    """A second signal, a failed allocation or write: each ends the run with what is saved and how to go on."""
    try:
        yield
    except StopAtOnce as stop:
        raise Stopped(f"stopped at once by {stop}. {saved(folder)} {_go_on(run)}", stop.number) from None
    except HalfApplied as error:
        raise VramplanError(f"{error}. {saved(folder)} {_go_on(run)}") from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise VramplanError(_memory_ran_out(error, run, folder, config)) from error
    except OSError as error:
        reason = f"{error.filename or run.path} cannot be used ({error.strerror or error})"
        remedy = " Free some disk space first." if error.errno == errno.ENOSPC else ""
        raise VramplanError(f"{reason}.{remedy} {saved(folder)} {_go_on(run)}") from None


def _memory_ran_out(error: BaseException, run: RunDirectory, folder: CheckpointFolder, config: RunConfig) -> str:
    words = (str(error).splitlines() or [type(error).__name__])[0]
    planned = config.plan.process_bytes
    expected = f" The plan expected {gib(planned)} for the whole process." if planned else ""
    if folder.paths():
        way = f"train on within what is free: {command('vramplan', 'train', '--resume', run.path, '--replan')}"
    else:
        way = "plan again with what is free now (--vram), or start with --replan"
    return f"memory ran out: {words}{expected} {saved(folder)} Close other programs, or {way}"


def saved(folder: CheckpointFolder) -> str:
    """Which checkpoint there is to go on from."""
    last = next(iter(folder.paths()), None)
    return f"The last checkpoint is {last}." if last else "No checkpoint was saved before."


def _go_on(run: RunDirectory) -> str:
    return f"Resume with: {command('vramplan', 'train', '--resume', run.path)}"
