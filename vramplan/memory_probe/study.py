"""Where the autotuner's study is kept, and who is at work on it."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Problem, VramplanError

if TYPE_CHECKING:
    import optuna

STALE_SECONDS = 86_400.0
"""A trial of another machine that has run for so long is given up."""

BUSY_SECONDS = 60.0
"""How long another session's write to a SQLite study is waited for."""


def open_study(storage: str, name: str, seed: int = 0) -> optuna.Study:
    """Open or create the study. ``storage`` is any URL Optuna takes, or the path of a journal file (``*.journal``).

    Raises ConfigError when the storage cannot be used.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=3)
    try:
        found: Any = storage
        if storage.endswith(".journal"):
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            found = JournalStorage(JournalFileBackend(storage))
        elif storage.startswith("sqlite"):
            waiting = {"connect_args": {"timeout": BUSY_SECONDS}}
            found = optuna.storages.RDBStorage(storage, engine_kwargs=waiting)
        study = optuna.create_study(
            storage=found, study_name=name, direction="maximize", sampler=sampler, load_if_exists=True
        )
    except Exception as error:  # SQLAlchemy's, the database driver's or the file system's
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "use sqlite:///FILE, a FILE.journal, or another of Optuna's URLs"
        raise ConfigError(Problem("--storage", storage, f"cannot be used ({first})", remedy)) from None
    if [d.name for d in study.directions] != ["MAXIMIZE"]:
        raise ConfigError(Problem("--study", name, "was made for something else in this storage", "name another"))
    return study


def session_lock(storage: str) -> contextlib.AbstractContextManager[object]:
    """What a session holds while it takes a trial: SQLite would give the same enqueued one to two of them."""
    path = storage.removeprefix("sqlite:///").partition("?")[0]
    if not storage.startswith("sqlite:///") or not path or path == ":memory:":
        return contextlib.nullcontext()
    from filelock import FileLock

    return FileLock(f"{path}.lock")


def abandoned(trial: Any) -> bool:
    """Whether nobody works on a running trial any more: its process here is gone, or it is too old."""
    if trial.datetime_start is not None and time.time() - trial.datetime_start.timestamp() > STALE_SECONDS:
        return True
    host, pid = trial.user_attrs.get("session", ("", 0))
    if host != platform.node() or os.name == "nt":  # where asking for a process would interrupt it
        return False
    if pid == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def check_space(study: optuna.Study, levels: dict[str, list[Any]]) -> None:
    """A study's parameters keep their choices for good. Raises VramplanError when these are others."""
    for trial in study.get_trials(deepcopy=False):
        for name, distribution in trial.distributions.items():
            known = list(getattr(distribution, "choices", ()))
            if name in levels and known != levels[name]:
                raise VramplanError(
                    f"the study {study.study_name} was begun over other choices of {name} ({known}); "
                    "begin another with --study NAME"
                )
