"""Texts, tokenizers, token files and batches of the language model."""

import array
from pathlib import Path

import pytest
import torch
from lm_setup import TINY, write_text

from fastlstm.lm import data
from fastlstm.lm.config import LanguageModelError
from fastlstm.lm.data import Batches, Corpus, encode_corpus, load_corpus
from fastlstm.lm.tokenizer import UNKNOWN_CHARACTER, tokenizer_from_json, train_tokenizer

TRICKY = "tab\there,  two spaces\n\n\n  indented\r\nnaïve – 東京 🦊👩‍👩‍👧 \x00 end"  # noqa: RUF001


def test_pydoc_holds_topics_and_docstrings():
    text = "".join(load_corpus("pydoc").pieces())
    assert len(text) > 1_000_000
    assert "is used to wrap the execution of a block" in text  # a topic
    assert text.count("Serialize ``obj`` to a JSON formatted ``str``.") == 1  # a docstring of json


def test_stdlib_is_the_sources_without_the_tests():
    documents = [Path(document) for document in load_corpus("stdlib", seed=3).documents]
    assert len(documents) > 300
    assert {"json", "typing.py", "argparse.py"} <= {part for document in documents for part in document.parts}
    assert not any("test" in document.parts for document in documents)
    again, other = load_corpus("stdlib", seed=3).documents, load_corpus("stdlib", seed=4).documents
    assert again == documents != other
    assert sorted(other) == sorted(documents)


def test_folder_is_read_recursively_and_what_is_no_text_is_skipped(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("alpha\n")
    (tmp_path / "sub" / "b.md").write_text("\ufeffbéta\n", encoding="utf-8")
    (tmp_path / "sub" / "empty.txt").touch()
    (tmp_path / "nul.bin").write_bytes(b"text\0text")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("café".encode()[:-1])
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "sub" / ".git" / "config").write_text("no")
    corpus = load_corpus(str(tmp_path))
    assert sorted("".join(Corpus([document]).pieces()) for document in corpus.documents) == [
        "alpha\n",
        "béta\n",
    ]
    assert corpus.skipped == 3


def test_pieces_cut_a_file_at_line_ends_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 100)
    path = write_text(tmp_path / "text.txt")
    pieces = list(Corpus([path, "x" * 250]).pieces())
    assert "".join(pieces) == path.read_text(encoding="utf-8") + "x" * 250
    assert len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces[:-3])
    assert [len(piece) for piece in pieces[-3:]] == [100, 100, 50]


@pytest.mark.parametrize(("kind", "vocab_size"), [("bpe", 270), ("char", 0)])
def test_tokenizers_give_back_the_text_they_encoded(kind, vocab_size):
    text = TRICKY + " the fox the fox the foxes, the quick foxes" * 3
    tokenizer = train_tokenizer([text], TINY.replace(tokenizer=kind, vocab_size=vocab_size))
    assert tokenizer.get_vocab_size() == (vocab_size or len(set(text)) + 1)
    for copy in (tokenizer, tokenizer_from_json(tokenizer.to_str())):
        assert copy.decode(copy.encode(text).ids, skip_special_tokens=False) == text


def test_bpe_encodes_text_it_never_saw():
    tokenizer = train_tokenizer(["abab abab"], TINY.replace(vocab_size=257))
    assert tokenizer.decode(tokenizer.encode(TRICKY).ids) == TRICKY


def test_char_vocabulary_can_be_smaller_than_the_text():
    tokenizer = train_tokenizer(["aaabbc"], TINY.replace(tokenizer="char", vocab_size=3))
    assert tokenizer.decode(tokenizer.encode("abca").ids) == f"ab{UNKNOWN_CHARACTER}a"


def test_token_file_holds_the_ids_and_splits_off_its_end(tmp_path):
    path = write_text(tmp_path / "text.txt", lines=400)
    corpus = Corpus([path])
    tokenizer = train_tokenizer(corpus.pieces(), TINY)
    tokens = encode_corpus(corpus, tokenizer, tmp_path / "tokens.bin", validation_fraction=0.25)
    expected = [i for piece in corpus.pieces() for i in tokenizer.encode(piece).ids]
    assert tokens.ids.tolist() == expected
    assert array.array("i", (tmp_path / "tokens.bin").read_bytes()).tolist() == expected
    assert tokens.validation.numel() == round(0.25 * len(expected))
    assert torch.equal(torch.cat([tokens.train, tokens.validation]), tokens.ids)


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_continue_lane_by_lane(drop_last):
    lanes, length = 3, 4
    ids = torch.arange(3 * 10 + 3)  # 32 // 3 = 10 tokens in a lane
    batches = Batches(ids, length, lanes, drop_last=drop_last)
    assert len(batches) == (2 if drop_last else 3)
    inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    for lane in range(lanes):
        steps = len(inputs)
        assert inputs[:, lane].tolist() == list(range(10 * lane, 10 * lane + steps))
        assert targets[:, lane].tolist() == list(range(10 * lane + 1, 10 * lane + steps + 1))
    assert all(x.shape == (length, lanes) for x, _ in list(batches)[:2])
    assert inputs.dtype == targets.dtype == torch.int64


def test_batches_of_too_few_tokens_are_refused():
    assert len(Batches(torch.arange(41), 10, 4, drop_last=True)) == 1
    with pytest.raises(LanguageModelError, match=r"40 tokens are too few for batch_size 4 x .* 10, which need 41"):
        Batches(torch.arange(40), 10, 4, drop_last=True)
