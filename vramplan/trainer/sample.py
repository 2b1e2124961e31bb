"""Text from a trained checkpoint: the newest good one of a run directory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, Problem
from ..runconfig import RunConfig
from .cache import KVCache
from .checkpoint import Checkpoint, CheckpointFolder, OnSkip, all_finite, fitting, load, step_of
from .model import GPT
from .rundir import RunDirectory
from .tokenizer import Tokenizer, load_tokenizer

SEEDS = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn, and when a text ends.

    ``temperature`` 0 always takes the most likely token. Of the tokens only the ``top_k`` likeliest are considered, and
    of these only the likeliest that together have a probability of at least ``top_p``; None considers all. A text ends
    with its document, after ``max_new_tokens``, or before the first of the ``stop`` strings to be complete in it.

    The same seed gives the same text. Of ``num_samples`` texts the first has ``seed``, the next one more, and so on:
    any of them comes again, alone, by its own seed.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None
    seed: int = 1337
    stop: Sequence[str] = ()
    num_samples: int = 1

    def check(self) -> None:
        """Raise ConfigError with everything that is out of range."""
        problems = []
        if self.num_samples < 1:
            problems.append(Problem("num_samples", self.num_samples, "must be at least 1"))
        elif not 0 <= self.seed <= SEEDS - self.num_samples:
            of_all = f" for each of {self.num_samples} texts" if self.num_samples > 1 else ""
            problems.append(Problem("seed", self.seed, f"must lie between 0 and 2^63 - 1{of_all}"))
        if self.max_new_tokens < 1:
            problems.append(Problem("max_new_tokens", self.max_new_tokens, "must be at least 1"))
        if not 0 <= self.temperature < float("inf"):
            problems.append(Problem("temperature", self.temperature, "must be 0 (greedy) or a positive number"))
        if self.top_k is not None and self.top_k < 1:
            problems.append(Problem("top_k", self.top_k, "must be at least 1", "leave it out to consider every token"))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            rule = "must be above 0 and at most 1"
            problems.append(Problem("top_p", self.top_p, rule, "leave it out to consider every token"))
        if "" in self.stop:
            problems.append(Problem("stop", "", "is empty, and would end every text at once", "leave it out"))
        if problems:
            raise ConfigError(problems)


def find_checkpoint(
    run_dir: str | Path, on_skip: OnSkip = lambda path, why: None, *, best: bool = False
) -> tuple[Path, Checkpoint]:
    """The newest good checkpoint of a run, and its path; ``on_skip`` hears of damaged ones that are newer.

    ``best``: the one with the lowest validation loss instead. Raises DataError when there is none.
    """
    run = RunDirectory(run_dir)
    folder = CheckpointFolder(run.checkpoints)
    if best and (known := run.best_saved()):
        path = next(p for p in folder.paths() if step_of(p) == known[1])
        return path, load(path)
    if best and folder.paths():
        rule = "has no checkpoint that was evaluated, so that none is known to be the best"
        raise DataError(Problem("--best", str(run_dir), rule, "leave --best out: the newest is taken"))
    found = folder.newest(on_skip)
    if found is None:
        raise DataError(Problem("run_dir", str(run_dir), "holds no checkpoint", "name the directory of a training run"))
    return found


def load_model(run_dir: str | Path, device: torch.device, *, best: bool = False) -> tuple[GPT, RunConfig, int]:
    """The model of the newest good checkpoint, or the best, its configuration, and after how many steps it was saved.

    On a CPU it computes in float32 whatever it was trained in: half precision is slower there. Raises DataError when
    the directory holds no usable checkpoint.
    """
    path, checkpoint = find_checkpoint(run_dir, best=best)
    config = checkpoint.config
    step = replace(config.step_config, compile=False, checkpointing="none")
    if device.type == "cpu":
        step = replace(step, dtype="float32")
    model = GPT(config.shape, step)
    with fitting(path):
        model.load_state_dict(checkpoint.model)
    if not all_finite(model):
        rule = "holds weights that are not numbers: the run had diverged"
        raise DataError(Problem("checkpoint", str(path), rule, "start a new run with a lower learning_rate"))
    return model.to(device).eval(), config, checkpoint.step


def sample(
    run_dir: str | Path, prompt: str, how: Sampling, *, device: torch.device | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:  # fmt: skip
    """Continue ``prompt``; the first continuation alone. See :func:`stream`."""
    return "".join(next(stream(run_dir, prompt, how, device=device, tokenizer=tokenizer)))


def stream(
    run_dir: str | Path, prompt: str, how: Sampling, *, device: torch.device | None = None,
    tokenizer: Tokenizer | None = None, best: bool = False,
) -> Iterator[Iterator[str]]:  # fmt: skip
    """``how.num_samples`` continuations of ``prompt``, each yielded in whole characters as it is generated.

    The prompt is put at the beginning of a document. ``best``: by the checkpoint with the lowest validation loss, not
    by the newest. Raises ConfigError for settings out of range, DataError without a usable checkpoint or for one of
    another vocabulary.
    """
    how.check()
    device = device or torch.device("cpu")
    tokenizer = tokenizer or load_tokenizer()
    model, config, _ = load_model(run_dir, device, best=best)
    if config.model.vocab_size < tokenizer.n_vocab:
        rule = f"is smaller than GPT-2's {tokenizer.n_vocab} tokens: this model has another tokenizer's"
        raise DataError(Problem("model.vocab_size", config.model.vocab_size, rule))
    (prompt_tokens,) = tokenizer.encode_batch([prompt])
    context = [tokenizer.eot, *prompt_tokens]
    return (_continued(model, context, replace(how, seed=how.seed + i), tokenizer) for i in range(how.num_samples))


def _continued(model: GPT, context: list[int], how: Sampling, tokenizer: Tokenizer) -> Iterator[str]:
    tokens = generate(
        model, context, how.max_new_tokens, how.temperature, how.top_k, how.seed,
        n_vocab=tokenizer.n_vocab, top_p=how.top_p,
    )  # fmt: skip
    return until(_text(tokens, tokenizer), how.stop)


def generate(
    model: GPT,
    context: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    *,
    n_vocab: int,
    top_p: float | None = None,
) -> Iterator[int]:
    """Yield new token ids after ``context``, of which the last ``block_size`` are seen.

    Up to ``block_size`` tokens their keys and values are kept, and a new token costs one token's work.

    Ids from ``n_vocab`` on are padding of the embedding, without text: they are never drawn. Drawing happens on the
    CPU, so that a seed means the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    block_size, device = model.shape.block_size, model.wte.device
    context = list(context)
    cache = KVCache(model.shape, 1, model.dtype, device) if len(context) <= block_size else None
    for _ in range(max_new_tokens):
        if len(context) > block_size:  # every position moves with each new token: nothing can be kept
            cache = None
        seen = context[cache.length :] if cache is not None else context[-block_size:]
        with torch.no_grad():
            logits = model.logits(torch.tensor([seen], device=device), cache)[0, :n_vocab].cpu()
        token = _draw(logits, temperature, top_k, top_p, generator)
        context.append(token)
        yield token


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """One token id from (V,) float32 logits."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        smallest_kept = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    logits = logits.double()
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0)  # finite however cold it is
    if top_p is not None and top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero for all but the fewest tokens that together have ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered, ids = probabilities.sort(descending=True, stable=True)
    enough_before = ordered.cumsum(0)[:-1] >= top_p
    return probabilities.index_fill(0, ids[1:][enough_before], 0.0)


def _text(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Decode token by token. A character whose bytes are spread over tokens appears with its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if token == tokenizer.eot:
            break
        piece = decoder.decode(tokenizer.token_bytes(token))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """The text of ``pieces`` up to the stop string that is complete first; of two that end together, the longer.

    So the end does not depend on where the pieces begin and end. What may be the beginning of a stop string is held
    back until it is known.
    """
    held = ""
    for piece in pieces:
        held += piece
        ends = [(at + len(text), at) for text in stop if (at := held.find(text)) >= 0]
        ready = len(held) - _may_become(held, stop) if not ends else min(ends)[1]
        if ready:
            yield held[:ready]
        if ends:
            return
        held = held[ready:]
    if held:
        yield held


def _may_become(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of ``text`` that are the beginning of a stop string."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
