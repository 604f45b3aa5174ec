"""Text in, batches out: built-in and user's texts, token files, and stateful batches.

`load_corpus` finds the documents, `encode_corpus` writes their token ids to one file that is then
memory-mapped, so neither the text nor its tokens have to fit in memory, and `Batches` cuts the ids into
lanes for truncated back-propagation through time. `train.py` and `demo.py` call all three. Documents come in
a fixed pseudo-random order, so that the validation split, the end of the stream, is a fair sample of whole
documents.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import math
import random
import sysconfig
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastlstm.lm.config import LanguageModelError
from fastlstm.lm.tokenizer import encode_pieces

BUILT_IN = ("pydoc", "stdlib")
PIECE = 1 << 16  # characters that are read, and encoded, at once
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """A text: its documents in reading order, and how many files were left out because they are not text.

    A document is the text itself, or the path of a UTF-8 file that is read piece by piece.
    """

    documents: Sequence[str | Path]
    skipped: int = 0

    def pieces(self) -> Iterator[str]:
        """The text in order, in pieces of about `PIECE` characters; a file is cut at the ends of lines."""
        for document in self.documents:
            if isinstance(document, str):
                yield from (document[start : start + PIECE] for start in range(0, len(document), PIECE))
                continue
            with document.open(encoding="utf-8-sig") as file:
                while piece := file.read(PIECE):
                    yield piece + file.readline(PIECE)


def load_corpus(data: str, seed: int = 0) -> Corpus:
    """The documents behind the name of a built-in text, or behind a path.

    Built in are "pydoc", what Python's own documentation tool shows (the language topics and the docstrings
    of the standard library), and "stdlib", the sources of the standard library; both leave the library's
    tests out. Any other `data` is a file, or a folder that is searched recursively. A file is text if all of
    it decodes as UTF-8 and it holds no NUL byte; other files in a folder are skipped and counted, and names
    with a leading dot are not looked at.

    Args:
        data: a member of `BUILT_IN`, or a path.
        seed: of the order of the documents.

    Raises:
        LanguageModelError: nothing is there, it is not text, or it is empty.
    """
    skipped = 0
    if data in BUILT_IN:
        documents: list[str | Path] = [*(_pydoc_texts() if data == "pydoc" else _library_sources())]
        if not documents:
            raise LanguageModelError(f"data: this Python installation lacks its {data} text; name a file or folder")
    else:
        documents, skipped = _text_files(Path(data))
    random.Random(seed).shuffle(documents)
    return Corpus(documents, skipped)


def _text_files(path: Path) -> tuple[list[str | Path], int]:
    if not path.exists():
        raise LanguageModelError(f"data: no such file or folder: {path} (built-in texts: {', '.join(BUILT_IN)})")
    if not path.is_dir():
        if not _is_text(path):
            raise LanguageModelError(f"data: not a text file (UTF-8 without NUL bytes): {path}")
        if path.stat().st_size == 0:
            raise LanguageModelError(f"data: the file is empty: {path}")
        return [path], 0
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    texts = [file for file in files if _is_text(file)]
    documents: list[str | Path] = [file for file in texts if file.stat().st_size > 0]
    if not documents:
        raise LanguageModelError(f"data: no text in the folder {path} ({len(files)} files, all empty or not text)")
    return documents, len(files) - len(texts)


def _is_text(path: Path) -> bool:
    if not path.is_file():
        return False
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                if b"\0" in block:
                    return False
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _library_sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = (file for file in root.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(root).parts))
    return sorted(file for file in sources if _is_text(file) and file.stat().st_size > 0)


def _pydoc_texts() -> list[str]:
    """A text for each language topic, and one for each module: its docstrings, repeated ones left out."""
    from pydoc_data.topics import topics

    texts = [topic.strip() + "\n\n" for _, topic in sorted(topics.items())]
    seen: set[str] = set()
    for source in _library_sources():
        with warnings.catch_warnings():  # invalid escapes in some sources
            warnings.simplefilter("ignore")
            tree = ast.parse(source.read_text(encoding="utf-8"))
        docstrings = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        new = [text for text in dict.fromkeys(docstrings) if text and text not in seen]
        seen.update(new)
        if new:
            texts.append("\n\n".join(new) + "\n\n")
    return texts


@dataclass(frozen=True)
class TokenFile:
    """Token ids of a corpus in a memory-mapped file: a training part and, behind it, a validation part.

    Attributes:
        ids: [N] int32.
        train_size: tokens of the training part.
        sha256: of the file's bytes.
    """

    ids: Tensor
    train_size: int
    sha256: str

    @property
    def train(self) -> Tensor:
        """The ids [train_size] of the training part."""
        return self.ids[: self.train_size]

    @property
    def validation(self) -> Tensor:
        """The ids [N - train_size] of the validation part."""
        return self.ids[self.train_size :]


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, path: Path, validation_fraction: float) -> TokenFile:
    """Write the corpus to `path` as token ids, 4-byte integers in native order, and map the file.

    Raises:
        LanguageModelError: the text has too few tokens to be split.
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        for ids in encode_pieces(tokenizer, corpus.pieces()):
            array("i", ids).tofile(file)
    return open_token_file(path, validation_fraction)


def open_token_file(path: Path, validation_fraction: float) -> TokenFile:
    """Map a file that `encode_corpus` wrote; arguments and errors as there."""
    size = path.stat().st_size // 4
    train_size = size - max(2, round(size * validation_fraction))
    if train_size < 2:
        raise LanguageModelError(f"data: the text has only {size} tokens, too few for a training and a validation part")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    ids = torch.from_file(str(path), shared=False, size=size, dtype=torch.int32)
    return TokenFile(ids, train_size, digest.hexdigest())


class Batches(Sequence[tuple[Tensor, Tensor]]):
    """Batches for truncated back-propagation through time: each goes on where the one before ended.

    The ids are cut into B lanes of equal length (a remainder of less than B tokens is not read). Item k is
    (inputs, targets), both [T, B] int64: T consecutive tokens of every lane, and their successors. The LSTM
    state after item k is the initial state of item k + 1.

    Args:
        ids: [N] token ids.
        sequence_length: T.
        batch_size: B.
        drop_last: leave out the last, shorter item.

    Raises:
        LanguageModelError: N is too small for a single item.
    """

    def __init__(self, ids: Tensor, sequence_length: int, batch_size: int, drop_last: bool = False) -> None:
        lane = (ids.numel() - 1) // batch_size
        if lane < (sequence_length if drop_last else 1):
            raise LanguageModelError(
                f"data: {ids.numel()} tokens are too few for batch_size {batch_size} x sequence_length "
                f"{sequence_length}, which need {batch_size * sequence_length + 1}: "
                "give more text, or lower one of them"
            )
        self.sequence_length = sequence_length
        self._inputs = ids[: batch_size * lane].view(batch_size, lane)
        self._targets = ids[1 : batch_size * lane + 1].view(batch_size, lane)
        self._count = lane // sequence_length if drop_last else math.ceil(lane / sequence_length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not 0 <= k < self._count:
            raise IndexError(f"batch {k} of {self._count}")
        steps = slice(k * self.sequence_length, (k + 1) * self.sequence_length)
        return self._inputs[:, steps].t().long(), self._targets[:, steps].t().long()
