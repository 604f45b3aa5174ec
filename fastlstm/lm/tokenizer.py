"""Tokenizers trained on the user's text, on top of the `tokenizers` library.

Both kinds give back exactly the text that they encoded: "bpe" is byte-level byte-pair encoding (Sennrich et
al. 2016, on bytes as in GPT-2), so no text is outside its vocabulary; "char" has one token per character,
and U+FFFD stands for the characters left out of a smaller vocabulary. `train.py` trains one, checkpoints
hold its JSON, `generate.py` decodes with it token by token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastlstm.lm.config import Config, LanguageModelError

UNKNOWN_CHARACTER = "\ufffd"


def train_tokenizer(pieces: Iterable[str], config: Config) -> Tokenizer:
    """Train the tokenizer that `config` asks for.

    Args:
        pieces: the text in order, in pieces of any size.
        config: `tokenizer` and `vocab_size` are read.

    Returns:
        A tokenizer of exactly `config.vocab_size` tokens (for "char" and 0: of as many as the text has
        characters).

    Raises:
        LanguageModelError: the text does not have that many tokens.
    """
    tokenizer = _train_char(pieces, config.vocab_size) if config.tokenizer == "char" else _train_bpe(pieces, config)
    found = tokenizer.get_vocab_size()
    if found < config.vocab_size:
        raise LanguageModelError(
            f"vocab_size is {config.vocab_size}, but the text gives only {found} tokens: "
            f"ask for at most {found} (--vocab), or give more text"
        )
    return tokenizer


def _train_bpe(pieces: Iterable[str], config: Config) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def _train_char(pieces: Iterable[str], vocab_size: int) -> Tokenizer:
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(piece)
    del counts[UNKNOWN_CHARACTER]
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    kept = by_frequency[: vocab_size - 1] if vocab_size else by_frequency
    vocabulary = {character: index for index, character in enumerate([UNKNOWN_CHARACTER, *kept])}
    # Byte-pair encoding without a single merge: much faster in the library than splitting by a regular
    # expression.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN_CHARACTER))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        LanguageModelError: `text` is not the JSON of a tokenizer.
    """
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise LanguageModelError(f"not a tokenizer: {error}") from error


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str], group: int = 16) -> Iterator[list[int]]:
    """Token ids of each piece, in order; `group` pieces at once are encoded on the library's threads."""
    waiting: list[str] = []
    for piece in pieces:
        waiting.append(piece)
        if len(waiting) == group:
            yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(waiting))
            waiting.clear()
    yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(waiting))
