"""The demo corpus: real text without a download, in FineWeb's schema."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vramplan.runconfig import DataSection
from vramplan.trainer.data import prepare

SCRIPT = Path(__file__).parents[2] / "examples" / "demo_corpus.py"


@pytest.fixture(scope="module")
def demo_corpus():
    spec = importlib.util.spec_from_file_location("demo_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(demo_corpus, tmp_path_factory):
    return demo_corpus.write_corpus(tmp_path_factory.mktemp("corpus") / "demo.parquet")


def test_it_has_finewebs_columns_and_enough_text(corpus):
    table = pq.read_table(corpus["path"])
    assert {f.name: str(f.type) for f in table.schema} == {
        "text": "string", "id": "string", "dump": "string", "url": "string", "date": "string", "file_path": "string",
        "language": "string", "language_score": "double", "token_count": "int64",
    }  # fmt: skip
    assert table.num_rows == corpus["documents"] > 100
    assert 1e6 < corpus["characters"] < 5e6
    assert len(set(table["id"].to_pylist())) == table.num_rows


def test_it_is_real_prose_with_the_sources_left_unimported(corpus):
    texts = pq.read_table(corpus["path"])["text"].to_pylist()
    assert any("assert" in t and "statement" in t for t in texts[:79])
    assert sum(len(t.split()) for t in texts) > 150_000


def test_documents_are_in_a_fixed_order(corpus):
    paths = [path.split("/")[1:] for path in pq.read_table(corpus["path"])["file_path"].to_pylist()]
    topics = [name for kind, name in paths if kind == "topics"]
    library = [name for kind, name in paths if kind == "library"]
    assert [kind for kind, _ in paths] == ["topics"] * len(topics) + ["library"] * len(library)
    assert topics == sorted(topics)
    assert library == sorted(library, key=lambda name: name.split("."))


def test_it_can_be_prepared_with_the_default_settings(corpus, tokenizer, tmp_path):
    shards = prepare(corpus["path"], tmp_path / "out", tokenizer, DataSection(), 50304, block_size=256)
    assert shards.train_tokens > 300_000
    assert shards.held_out(256)
    assert shards.val_tokens >= 0.004 * (shards.train_tokens + shards.val_tokens)
