"""Fixtures of the trainer's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-exact losses need a fixed number of threads; the processes that tests start use one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shards(make_shards, learnable_tokens):
    return make_shards(train=learnable_tokens(2001), val=learnable_tokens(300, seed=1))
