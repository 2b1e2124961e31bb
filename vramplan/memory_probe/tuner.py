"""The autotuner: an Optuna study over ways to run the same steps, each measured once in a child process.

The arms are what the planner's search found possible, best first; it decides where the study begins. Then one setting
is varied at a time, from the best known arm; then the settings that did best are combined; from there on Optuna's TPE
proposes. An arm that the estimate does not let into the memory, or that ran out of it, is a violated constraint with no
tokens per second: a failed trial would teach the sampler nothing. A trial is stored before its result counts, so that a
study can be killed at any time and goes on from where it was.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Problem, VramplanError
from ..planner.shape import Shape
from ..planner.step import StepConfig
from .study import abandoned, check_space

if TYPE_CHECKING:
    import optuna

Params = dict[str, Any]
Key = tuple[Any, ...]

SETTINGS = ("shape", "batch_size", "compile", "loss", "checkpointing", "optimizer", "allocator")
"""What an arm may differ in. dtype and tokens per step stay: they change what is trained."""

LEVELS = 6
"""Values of one setting that are tried around the best arm, the planner's favourites first."""

PROPOSALS, ATTEMPTS = 5, 50
"""How often the sampler is asked before it is told what to try, and how often in all."""

GAIN = 0.01
"""An improvement by less is none: repeated timings differ by as much."""

PATIENCE = 10
"""Measured arms without an improvement after which the study has reached its plateau."""

VIOLATED = "fits"
"""Name of the constraint: above 0 is the share by which memory was missed, or 1 where that is not known."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the steps. ``rank`` is its place in the planner's order, ``predicted`` its tokens/s if known."""

    shape: Shape
    step: StepConfig
    alloc_conf: str = ""
    rank: int = 0
    predicted: float | None = None

    @property
    def params(self) -> Params:
        """Its settings as Optuna's parameters."""
        step = self.step
        loss = f"chunked {step.loss_chunk_tokens}" if step.loss == "chunked" else "full"
        return {
            "shape": self.shape.label, "batch_size": int(step.batch_size), "compile": step.compile, "loss": loss,
            "checkpointing": step.checkpointing, "optimizer": step.optimizer, "allocator": self.alloc_conf or "default",
        }  # fmt: skip

    @property
    def key(self) -> Key:
        """The same as something to look up."""
        return key_of(self.params)


@dataclass(frozen=True, slots=True)
class Result:
    """What measuring an arm gave: tokens/s, or None and by which share memory was missed (``violation``, above 0).

    ``score`` is what arms are compared by, tokens/s unless something steadier is known; ``needs_bytes`` what the
    process took, which another session may have less of. ``outcome`` is the measurement's, or ``estimate`` when the
    estimate alone ruled it out; ``failed`` neither fits nor speaks about memory.
    """

    outcome: str
    tokens_per_second: float | None = None
    violation: float | None = None
    score: float | None = None
    needs_bytes: int | None = None
    reason: str = ""
    measurement: str = ""

    @property
    def value(self) -> float:
        """The score, or tokens/s; 0 for what did not run."""
        return self.score or self.tokens_per_second or 0.0

    @property
    def failed(self) -> bool:
        """Whether it says nothing: neither speed nor memory."""
        return self.tokens_per_second is None and self.violation is None


@dataclass(frozen=True, slots=True)
class Trial:
    """One arm of the study with its result, in the order in which they ended."""

    number: int
    arm: Arm
    result: Result


@dataclass(frozen=True, slots=True)
class Tuned:
    """How a study stands. ``stopped`` says why no further arm was measured."""

    trials: tuple[Trial, ...]
    arms: int
    stopped: str
    best: Trial | None = field(default=None)

    @property
    def probes(self) -> int:
        """Arms that touched the device."""
        return sum(t.result.outcome != "estimate" for t in self.trials)


Measure = Callable[[Arm], Result]
RuledOut = Callable[[Arm], Result | None]
OnTrial = Callable[[Trial, Trial | None], None]


def key_of(params: Params) -> Key:
    """Parameters as something to look up."""
    return tuple(params.get(name) for name in SETTINGS)


def tune(
    study: optuna.Study,
    arms: Sequence[Arm],
    measure: Measure,
    *,
    ruled_out: RuledOut = lambda arm: None,
    budget_bytes: int | None = None,
    lock: contextlib.AbstractContextManager[object] | None = None,
    seconds: float = math.inf,
    trials: int | None = None,
    patience: int = PATIENCE,
    on_trial: OnTrial = lambda trial, best: None,
) -> Tuned:
    """Measure arms until nothing better has come for ``patience`` of them, or time, trials or arms are used up.

    ``arms`` in the planner's order, best first, those that the estimate rules out last. What the study knows already
    counts and is not measured again. ``ruled_out`` gives the result of an arm that need not be measured, which holds
    for this session only; an arm that took more than ``budget_bytes`` is none that fits. ``lock`` is held while an arm
    is taken (:func:`~vramplan.memory_probe.study.session_lock`). When ``measure`` is interrupted the study is left as
    it is, without the arm that was being measured.
    """
    if not arms:
        raise ConfigError(Problem("arms", "missing", "there is nothing to try", "allow more settings"))
    from optuna.exceptions import StorageInternalError

    try:
        tuner = _Tuner(study, arms, measure, ruled_out, budget_bytes, lock or contextlib.nullcontext())
        return tuner.run(seconds, trials or len(arms), patience, on_trial)
    except StorageInternalError as error:
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise VramplanError(f"the study {study.study_name} cannot be kept where it is ({first})") from None


class _Tuner:
    """A study in progress."""

    def __init__(
        self,
        study: optuna.Study,
        arms: Sequence[Arm],
        measure: Measure,
        ruled_out: RuledOut,
        budget_bytes: int | None,
        lock: contextlib.AbstractContextManager[object],
    ) -> None:
        self._study, self._measure, self._lock = study, measure, lock
        self._check, self._budget_bytes = ruled_out, budget_bytes
        self._checked: dict[Key, Result | None] = {}
        self._arms = {arm.key: arm for arm in arms}
        self._levels = {name: sorted({arm.params[name] for arm in arms}) for name in SETTINGS}
        check_space(study, self._levels)
        with self._lock:
            self._give_up_stale()

    def run(self, seconds: float, most: int, patience: int, on_trial: OnTrial) -> Tuned:
        """Go on until one of the ends is reached."""
        start = time.monotonic()
        while not (stopped := self._reason_to_stop(start, seconds, most, patience)):
            with self._lock:
                trial = self._next_trial()
            if trial is None:
                stopped = "every arm has been tried"
                break
            arm = self._arms[key_of(trial.params)]
            try:
                result = self._ruled_out(arm) or self._measure(arm)
            except BaseException:
                self._study.tell(trial, state=_states().FAIL)
                raise
            done = self._finish(trial, arm, result)
            on_trial(done, self._best())
        return Tuned(tuple(self._trials()), len(self._arms), stopped, self._best())

    # ---------------------------------------------------------------- what is known

    def _ruled_out(self, arm: Arm) -> Result | None:
        if arm.key not in self._checked:
            self._checked[arm.key] = self._check(arm)
        return self._checked[arm.key]

    def _trials(self) -> list[Trial]:
        """Finished trials of arms that are still arms; the first, where two sessions took the same.

        What an estimate ruled out under another budget does not count.
        """
        found: dict[Key, Trial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            arm = self._arms.get(key_of(trial.params))
            if arm is not None and self._counts(trial) and trial.state.is_finished():
                found.setdefault(arm.key, Trial(trial.number, arm, _result(trial.user_attrs)))
        return list(found.values())

    def _best(self) -> Trial | None:
        running = [t for t in self._trials() if t.result.value and self._fits(t)]
        return max(running, key=lambda t: t.result.value, default=None)

    def _fits(self, trial: Trial) -> bool:
        """Whether it stays within what there is now."""
        needs, budget = trial.result.needs_bytes, self._budget_bytes
        return self._ruled_out(trial.arm) is None and (needs is None or budget is None or needs <= budget)

    def _counts(self, trial: Any) -> bool:
        """Whether a trial of the study has a result that holds for this session."""
        outcome = trial.user_attrs.get("outcome")
        return outcome is not None and (outcome != "estimate" or self._checked.get(key_of(trial.params)) is not None)

    def _taken(self) -> set[Key]:
        """Arms that are measured, or being measured by somebody."""
        states = _states()
        return {
            key_of(t.params)
            for t in self._study.get_trials(deepcopy=False)
            if t.state == states.RUNNING or self._counts(t)
        }

    def _reason_to_stop(self, start: float, seconds: float, most: int, patience: int) -> str:
        trials = self._trials()
        probed = [t for t in trials if t.result.outcome != "estimate"]
        if len(probed) >= most:
            return f"{len(probed)} arms measured"
        if time.monotonic() - start >= seconds:
            return "the time is used up"
        best, since = 0.0, 0
        for trial in probed:
            rate = trial.result.value
            best, since = (rate, 0) if rate > best * (1 + GAIN) else (max(best, rate), since + 1)
        if since >= patience and next(self._first_arms(), None) is None:
            return f"no improvement by {GAIN:.0%} in {since} arms"
        return ""

    # ---------------------------------------------------------------- what to try next

    def _next_trial(self) -> optuna.Trial | None:
        """A trial of an arm that nobody has tried: the next of the first arms, then what TPE proposes."""
        for attempt in range(ATTEMPTS):
            taken = self._taken()
            left = [arm for key, arm in self._arms.items() if key not in taken]
            if not left:
                return None
            chosen = next(self._first_arms(), None)
            if chosen is None and attempt >= PROPOSALS:
                chosen = self._most_promising(left)
            trial = self._ask(chosen)
            if self._is_ours(trial):
                return trial
            self._study.tell(trial, state=_states().PRUNED)
        return None

    def _ask(self, arm: Arm | None) -> optuna.Trial:
        """A trial of this arm, or of what the sampler wants; another session may snatch an enqueued one."""
        import optuna

        if arm is not None:
            self._study.enqueue_trial(arm.params)
        space: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution(levels) for name, levels in self._levels.items()
        }
        try:
            trial = self._study.ask(space)
        except ValueError as error:  # a trial that somebody enqueued over other choices
            name = self._study.study_name
            raise VramplanError(f"the study {name} holds a trial of another space ({error})") from None
        trial.set_user_attr("session", [platform.node(), os.getpid()])
        return trial

    def _is_ours(self, trial: optuna.Trial) -> bool:
        """Whether it is an arm, and no other trial has it; of two that run at once the first goes on."""
        key = key_of(trial.params)
        running = _states().RUNNING
        return key in self._arms and not any(
            self._counts(other) or (other.state == running and other.number < trial.number)
            for other in self._study.get_trials(deepcopy=False)
            if other.number != trial.number and key_of(other.params) == key
        )

    def _first_arms(self) -> Iterator[Arm]:
        """The planner's best; then one setting at a time from the best known arm; then the best levels together."""
        taken = self._taken()
        first = next(iter(self._arms.values()))
        if first.key not in taken:
            yield first
            return
        known = self._best()
        base = known.arm if known else first
        for name in SETTINGS:
            varied = [
                arm
                for arm in self._arms.values()
                if all(arm.params[other] == base.params[other] for other in SETTINGS if other != name)
            ]
            yield from (arm for arm in varied[: LEVELS + 1] if arm.key not in taken)
        effects, together = self._effects(), {}
        for name, levels in self._levels.items():
            gains = [effects.get((name, level), -math.inf) for level in levels]
            together[name] = levels[gains.index(max(gains))]
        combined = self._arms.get(key_of(together))
        if combined is not None and combined.key not in taken:
            yield combined

    def _effects(self) -> dict[tuple[str, Any], float]:
        """Of each level of each setting: mean log of its scores against those of arms that differ in it alone."""
        rates = {t.arm.key: math.log(t.result.value) for t in self._trials() if t.result.value}
        gains: dict[tuple[str, Any], list[float]] = {}
        for index, name in enumerate(SETTINGS):
            alike: dict[Key, list[float]] = {}
            for key, rate in rates.items():
                alike.setdefault(key[:index] + key[index + 1 :], []).append(rate)
            for key, rate in rates.items():
                others = alike[key[:index] + key[index + 1 :]]
                gains.setdefault((name, key[index]), []).append(rate - sum(others) / len(others))
        return {level: sum(found) / len(found) for level, found in gains.items()}

    def _most_promising(self, arms: list[Arm]) -> Arm:
        """By what their levels did elsewhere, then in the planner's order."""
        effects = self._effects()
        return max(arms, key=lambda arm: (sum(effects.get(level, 0.0) for level in arm.params.items()), -arm.rank))

    # ---------------------------------------------------------------- storing

    def _finish(self, trial: optuna.Trial, arm: Arm, result: Result) -> Trial:
        """Store the result before the trial is closed: whatever happens in between, nothing is lost."""
        attributes = {name: getattr(result, name) for name in Result.__dataclass_fields__}
        attributes["outcome"] = attributes.pop("outcome")  # last: with it the trial counts as finished
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        self._close(trial, result)
        return Trial(trial.number, arm, result)

    def _close(self, trial: Any, result: Result) -> None:
        if result.failed:
            self._study.tell(trial, state=_states().FAIL)
            return
        missing = (result.needs_bytes or 0) / self._budget_bytes - 1 if self._budget_bytes else 0.0
        if VIOLATED not in trial.constraints:  # killed between this and the next line it is there already
            trial.set_constraint(VIOLATED, result.violation if result.violation is not None else max(0.0, missing))
        self._study.tell(trial, result.value)

    def _give_up_stale(self) -> None:
        """Trials whose process is gone: finished ones are closed with their result, the others were never measured."""
        import optuna

        states = _states()
        for frozen in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if not abandoned(frozen):
                continue
            trial = optuna.Trial(self._study, frozen._trial_id)
            if "outcome" in frozen.user_attrs:
                self._close(trial, _result(frozen.user_attrs))
            else:
                self._study.tell(trial, state=states.FAIL)


def _states() -> Any:
    from optuna.trial import TrialState

    return TrialState


def _result(attributes: dict[str, Any]) -> Result:
    known: dict[str, Any] = {n: attributes[n] for n in Result.__dataclass_fields__ if n in attributes}
    return Result(**known)
