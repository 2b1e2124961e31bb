"""Text from a trained checkpoint: the newest good one of a run directory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, Problem
from ..runconfig import RunConfig
from .cache import KVCache
from .checkpoint import CheckpointFolder, all_finite, fitting
from .model import GPT
from .rundir import RunDirectory
from .tokenizer import Tokenizer, load_tokenizer


def load_model(run_dir: str | Path, device: torch.device) -> tuple[GPT, RunConfig, int]:
    """The model of the newest good checkpoint, its configuration, and after how many steps it was saved.

    On a CPU it computes in float32 whatever it was trained in: half precision is slower there. Raises DataError when
    the directory holds no usable checkpoint.
    """
    found = CheckpointFolder(RunDirectory(run_dir).checkpoints).newest()
    if found is None:
        raise DataError(Problem("run_dir", str(run_dir), "holds no checkpoint", "name the directory of a training run"))
    path, checkpoint = found
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
    run_dir: str | Path,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    seed: int = 1337,
    *,
    device: torch.device | None = None,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Continue ``prompt``; the continuation alone. See :func:`stream`."""
    pieces = stream(run_dir, prompt, max_new_tokens, temperature, top_k, seed, device=device, tokenizer=tokenizer)
    return "".join(pieces)


def stream(
    run_dir: str | Path,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 200,
    seed: int = 1337,
    *,
    device: torch.device | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` in whole characters as it is generated.

    The prompt is put at the beginning of a document, and generation ends with the document or after
    ``max_new_tokens``. ``temperature`` 0 always takes the most likely token; ``top_k`` None considers all. The same
    seed gives the same text. Raises ConfigError for settings out of range, DataError without a usable checkpoint.
    """
    _check(max_new_tokens, temperature, top_k, seed)
    device = device or torch.device("cpu")
    tokenizer = tokenizer or load_tokenizer()
    model, _, _ = load_model(run_dir, device)
    (prompt_tokens,) = tokenizer.encode_batch([prompt])
    tokens = generate(
        model, [tokenizer.eot, *prompt_tokens], max_new_tokens, temperature, top_k, seed, n_vocab=tokenizer.n_vocab
    )
    return _text(tokens, tokenizer)


def generate(
    model: GPT,
    context: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    *,
    n_vocab: int,
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
        token = _draw(logits, temperature, top_k, generator)
        context.append(token)
        yield token


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token id from (V,) float32 logits."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        smallest_kept = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    logits = logits.double()
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=0)  # finite however cold it is
    return int(torch.multinomial(probabilities, 1, generator=generator))


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


def _check(max_new_tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    problems = []
    if not 0 <= seed < 2**63:
        problems.append(Problem("seed", seed, "must lie between 0 and 2^63 - 1"))
    if max_new_tokens < 1:
        problems.append(Problem("max_new_tokens", max_new_tokens, "must be at least 1"))
    if not 0 <= temperature < float("inf"):
        problems.append(Problem("temperature", temperature, "must be 0 (greedy) or a positive number"))
    if top_k is not None and top_k < 1:
        problems.append(Problem("top_k", top_k, "must be at least 1", "leave it out to consider every token"))
    if problems:
        raise ConfigError(problems)
