"""Fixtures shared by the whole suite."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    """GPT-2's tokenizer, loaded once; the development extra brings its offline source."""
    from vramplan.trainer.tokenizer import load_tokenizer

    return load_tokenizer()
