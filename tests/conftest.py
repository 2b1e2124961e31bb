"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import tempfile

# before torch is imported, and for the processes that tests start: such small tensors gain nothing from more threads,
# and two of them wait for each other when the machine is busy (three times the time for the trainer's tests)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# what was measured on this machine is no business of the tests, nor theirs of the ledger
os.environ["VRAMPLAN_LEDGER"] = os.path.join(tempfile.gettempdir(), "vramplan-tests-have-no-ledger", "ledger.sqlite")

import hypothesis
import pytest

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session")
def tokenizer():
    """GPT-2's tokenizer, loaded once; the development extra brings its offline source."""
    from vramplan.trainer.tokenizer import load_tokenizer

    return load_tokenizer()


@pytest.fixture
def make_shards(tmp_path):
    """Write token ids straight into shards: ``make_shards(train=..., val=...) -> ShardSet``."""
    import numpy as np

    from vramplan.trainer.shards import Manifest, ShardSet, ShardWriter, token_dtype

    def make(train, val=(), *, n_vocab=64, shard_tokens=1000, directory=tmp_path / "shards"):
        directory.mkdir()
        shards = []
        for split, tokens in (("train", train), ("val", val)):
            with ShardWriter(directory, split, token_dtype(n_vocab), shard_tokens) as writer:
                writer.add(np.asarray(tokens))
            shards += writer.shards
        documents = {"train": 1, "val": min(1, len(val)), "null": 0, "empty": 0}
        Manifest(settings={}, n_vocab=n_vocab, documents=documents, shards=tuple(shards)).save(directory)
        return ShardSet.open(directory)

    return make


@pytest.fixture
def learnable_tokens():
    """``learnable_tokens(n)``: a noisy arithmetic sequence over 64 ids that a tiny GPT learns within a few steps."""
    import numpy as np

    def make(n, seed=0):
        rng = np.random.default_rng(seed)
        steps = np.where(rng.random(n) < 0.9, 3, rng.integers(0, 64, n))
        return np.cumsum(steps) % 64

    return make


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped, with a reason, where there is no CUDA device."""
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
