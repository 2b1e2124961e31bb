"""Logs of nanoGPT's train.py: every line that matters is found, whatever is around it; nothing else is."""

from __future__ import annotations

import io
import time

import pytest

from vramplan.errors import ConfigError
from vramplan.planner.nanogpt_config import NanoGPTConfig
from vramplan.report import nanogpt_log
from vramplan.report.nanogpt_log import NanoGPTLog, read_log
from vramplan.report.run_log import record_of_log

HEAD = """Overriding: n_layer = 4
Overriding: n_head = 4
Overriding: n_embd = 128
Overriding: block_size = 64
Overriding: batch_size = 8
Overriding: gradient_accumulation_steps = 2
Overriding: max_iters = 300
Overriding: lr_decay_iters = 300
Overriding: warmup_iters = 10
Overriding: eval_interval = 100
tokens per iteration will be: 1,024
found vocab_size = 65 (inside data/shakespeare_char/meta.pkl)
Initializing a new model from scratch
number of parameters: 0.80M
"""


def read(text: str | bytes) -> NanoGPTLog:
    return read_log(io.BytesIO(text.encode() if isinstance(text, str) else text), "log")


def iterations(steps, loss=lambda step: 4.0 - step / 1000, ms=lambda step: 50.0) -> str:
    return "".join(f"iter {s}: loss {loss(s):.4f}, time {ms(s):.2f}ms, mfu 2.00%\n" for s in steps)


@pytest.mark.parametrize(
    "prefix",
    ["", "[rank0]: ", "2026-11-02 09:00:00,125 - INFO - ", "| trainer-1 | ", "# ", "\x1b[32m", "12.5s 7 ", "50%|███| "],
)
def test_prefixes_of_loggers_do_not_matter(prefix: str) -> None:
    log = read(
        f"{prefix}step 20: train loss 3.5100, val loss 3.6200\n{prefix}iter 20: loss 3.5000, time 81.25ms, mfu 4.10%\n"
    )
    assert log.evaluations == {20: (3.51, 3.62)}
    assert log.losses == {20: 3.5}
    assert log.times == {20: (81.25, 4.1)}


def test_spelling_of_forks_is_read() -> None:
    log = read(
        "Step   100: train loss 3.5, train perplexity 33.1, val loss 3.625, time elapsed 5s\n"
        "iter 100: loss 3.4375, time 51.50ms\n"
        "iter 110: loss 3.4000, lr 3.0e-04, time 50.50ms, mfu 12.00%\n"
    )
    assert log.evaluations == {100: (3.5, 3.625)}
    assert log.times == {100: (51.5, None), 110: (50.5, 12.0)}


def test_words_that_only_look_like_a_line_are_not_taken() -> None:
    text = "total_iter 11: loss 4.0\nmy_step 5: train loss 1.0, val loss 2.0\niter: loss 3\niter 4 loss 3.0\nloss 3.2\n"
    with pytest.raises(ConfigError, match="has no line such as"):
        read(text)


def test_lines_rewritten_by_carriage_returns_are_lines() -> None:
    log = read("\r".join(f"\x1b[2Kiter {s}: loss {5 - s / 10:.4f}, time 9.00ms, mfu 1.00%" for s in range(5)))
    assert list(log.losses.items()) == [(0, 5.0), (1, 4.9), (2, 4.8), (3, 4.7), (4, 4.6)]


def test_losses_that_are_no_numbers_are_none() -> None:
    log = read(
        "iter 1: loss nan, time 9.00ms, mfu 1.00%\niter 2: loss inf, time 9.00ms, mfu nan%\n"
        "step 3: train loss nan, val loss NaN\n"
    )
    assert log.losses == {1: None, 2: None}
    assert log.evaluations == {3: (None, None)}


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        ("iter 20: loss 3.5", False),
        ("iter 20: loss 3.5000", True),
        ("iter 20: loss 3.5000, time 81", True),
        ("iter 20: loss 3.5000, time 81.25ms, mfu 4.1", True),
        ("iter 2", False),
        ("iter 20: loss 3.5\n", True),
        ("iter 20: loss nan", True),
    ],
)
def test_a_number_that_may_be_cut_off_is_left_out(last: str, kept: bool) -> None:
    log = read("iter 10: loss 3.6000, time 81.00ms, mfu 4.00%\n" + last)
    assert (20 in log.losses) == kept
    assert 2 not in log.losses


def test_a_cut_off_line_is_said() -> None:
    record = record_of_log(read("iter 10: loss 3.6000, time 81.00ms, mfu 4.00%\niter 20: loss 3."), "log", None)
    assert any("cut off" in note for note in record.notes)
    assert record.losses == ((10, 3.6),)


def test_of_a_resumed_run_the_later_lines_win_and_it_says_so() -> None:
    first = "step 0: train loss 4.2, val loss 4.3\n" + iterations(range(0, 101, 10))
    again = "step 50: train loss 3.9, val loss 3.95\n" + iterations(range(50, 81, 10), loss=lambda step: 2.0)
    record = record_of_log(read(first + "Resuming training from out\n" + again), "log", None)
    assert dict(record.losses) == {0: 4.0, 10: 3.99, 20: 3.98, 30: 3.97, 40: 3.96, 50: 2.0, 60: 2.0, 70: 2.0, 80: 2.0}
    assert record.validation == ((0, 4.3), (50, 3.95))
    assert record.steps_done == 80
    assert any("goes back 1 time" in note and "from step 100 to 50" in note for note in record.notes)


def test_of_two_runs_in_one_file_the_last_is_reported() -> None:
    smaller = HEAD.replace("128", "64").replace("0.80M", "0.20M")
    text = HEAD + iterations(range(0, 90, 10)) + smaller + iterations(range(0, 30, 10), loss=lambda step: 3.0)
    record = record_of_log(read(text), "log", None)
    assert record.losses == ((0, 3.0), (10, 3.0), (20, 3.0))
    assert record.shape is not None
    assert record.shape.n_embd == 64
    assert any("several in one file" in note for note in record.notes)


def test_a_line_that_a_logger_repeats_is_no_second_run() -> None:
    lines = iterations(range(0, 50, 10)).splitlines()
    log = read("\n".join(line for line in lines for _ in range(2)) + "\n")
    assert log.returns == []
    assert len(log.losses) == 5


def test_an_evaluation_printed_after_its_iteration_is_no_second_run() -> None:
    log = read(iterations([0, 10]) + "step 10: train loss 3.9, val loss 4.0\n" + iterations([20]))
    assert log.returns == []
    assert list(log.losses) == [0, 10, 20]


def test_the_configuration_is_taken_from_what_the_log_repeats() -> None:
    record = record_of_log(read(HEAD + iterations(range(0, 50, 10))), "log", None)
    assert record.shape is not None
    assert record.shape.label == "4L/4H/128E"
    assert record.vocab_size == 65
    assert record.tokens_per_step == 1024
    assert record.total_steps == 300
    assert record.from_scratch is True
    assert record.rates is not None
    assert record.rates.warmup_steps == 10
    assert record.missing == ()


def test_a_configuration_file_that_the_log_prints_is_read_but_not_run() -> None:
    file = "# a small model\nn_layer = 4\nn_head = 4\nn_embd = 2 * 64\nblock_size = 64\ndropout = 0.2\nprint(1)\n"
    text = f"Overriding config with config/small.py:\n{file}\n{HEAD[HEAD.index('tokens per') :]}" + iterations([0, 10])
    record = record_of_log(read(text), "log", None)
    assert record.shape is not None
    assert (record.shape.n_embd, record.shape.block_size) == (128, 64)


def test_without_a_configuration_what_is_missing_is_said() -> None:
    record = record_of_log(read(iterations(range(0, 50, 10))), "log", None)
    assert record.shape is None
    assert record.parameters is None
    assert "--config" in record.missing[0]


def test_the_default_model_is_known_by_its_printed_size() -> None:
    head = "tokens per iteration will be: 491,520\nnumber of parameters: 123.59M\n"
    record = record_of_log(read(head + iterations([0, 10])), "log", None)
    assert record.shape is not None
    assert record.shape.label == "12L/12H/768E"
    other = record_of_log(read(head.replace("123.59", "29.94") + iterations([0, 10])), "log", None)
    assert other.shape is None
    assert other.parameters_without_positions == 29_940_000


def test_where_log_and_config_differ_the_log_is_believed_and_it_is_said() -> None:
    record = record_of_log(read(HEAD + iterations([0, 10])), "log", NanoGPTConfig({"n_embd": 256, "n_layer": 4}))
    assert record.shape is not None
    assert record.shape.n_embd == 128
    assert any("n_embd is 128 by the log and 256 by --config" in note for note in record.notes)


def test_an_impossible_configuration_in_a_log_does_not_hide_its_losses() -> None:
    text = "Overriding: n_embd = 100\nOverriding: n_head = 7\nOverriding: n_layer = 2\n" + iterations([0, 10])
    record = record_of_log(read(text), "log", None)
    assert record.losses == ((0, 4.0), (10, 3.99))
    assert any("not divisible" in note for note in record.notes)


def test_evaluating_and_first_iterations_do_not_count_as_step_times() -> None:
    slow = {0: 9000.0, 100: 4000.0, 200: 4000.0}
    text = HEAD + iterations(range(0, 300, 10), ms=lambda step: slow.get(step, 50.0))
    record = record_of_log(read(text), "log", None)
    assert {seconds for _, seconds in record.step_seconds} == {0.05}
    assert len(record.step_seconds) == 27


def test_where_every_logged_iteration_evaluates_its_time_serves_and_that_is_said() -> None:
    text = HEAD + iterations(range(0, 400, 100), ms=lambda step: 60.0)
    record = record_of_log(read(text), "log", None)
    assert {seconds for _, seconds in record.step_seconds} == {0.06}
    assert any("include evaluations" in note for note in record.notes)


def test_processes_are_counted_from_the_printed_mfu() -> None:
    config = NanoGPTConfig({"n_embd": 384})
    per_process = 0.1312  # of an A100: 12L/12H/384E, 524,288 tokens in 3.839 s on each of the processes
    for processes in (1, 4, 8):
        tokens = 524_288 * processes
        text = f"tokens per iteration will be: {tokens:,}\n" + "".join(
            f"iter {s}: loss 4.0, time 3839.00ms, mfu {100 * per_process:.2f}%\n" for s in range(1, 50)
        )
        record = record_of_log(read(text), "log", config)
        assert record.processes == processes
        assert any("processes" in note for note in record.notes) == (processes > 1)


def test_powershell_writes_utf_16() -> None:
    text = "step 0: train loss 4.2, val loss 4.3\r\niter 0: loss 4.2500, time 9.00ms, mfu 1.00%\r\n"
    log = read("\ufeff".encode("utf-16-le") + text.encode("utf-16-le"))
    assert log.evaluations == {0: (4.2, 4.3)}
    assert log.losses == {0: 4.25}


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, bytes(range(256)) * 400, b"\xff\xfe", b"lorem ipsum\n" * 100])
def test_what_is_no_log_is_one_clear_error(content: bytes) -> None:
    with pytest.raises(ConfigError, match="has no line such as"):
        read(content)


def test_numbers_beyond_all_measure_do_not_spoil_the_rest() -> None:
    log = read(
        f"iter {'1' * 5000}: loss {'9' * 5000}\niter 5: loss 1e300, time 1e300ms, mfu 1e300%\n"
        "iter 6: loss 3.0, time -5ms, mfu -100.00%\n"
    )
    assert log.losses == {5: None, 6: 3.0}
    assert log.times == {}


def test_long_logs_and_lines_without_end_are_read_in_linear_time() -> None:
    began = time.perf_counter()
    text = "".join(f"x iter {s}: loss 3.{s % 10000:04}, time 39.00ms, mfu 12.70%\n" for s in range(40_000))
    assert len(read(text).losses) == 40_000
    with pytest.raises(ConfigError):
        read("iter 1 : loss  time " * 150_000)
    with pytest.raises(ConfigError):
        read("Overriding: a = " + "(" * 500_000)
    assert time.perf_counter() - began < 5


def test_a_stream_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanogpt_log, "LARGEST_LOG_BYTES", 3 * nanogpt_log.CHUNK_BYTES)

    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return b"iter 1 " * (size // 7)

    with pytest.raises(ConfigError, match="longer than"):
        read_log(Endless(), "-")
