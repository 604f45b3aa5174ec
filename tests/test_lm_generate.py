"""Generation: reproducible, streaming, and drawing from the distribution that was asked for."""

import pytest
import torch
from lm_setup import TINY, Recorder, write_text
from torch import nn
from typer.testing import CliRunner

from fastlstm.cli import app
from fastlstm.lm.generate import generate, load_model, sample
from fastlstm.lm.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    config = TINY.replace(
        data=str(write_text(folder / "text.txt")),
        vocab_size=300,
        hidden_size=32,
        num_layers=1,
        dropout_input=0.0,
        dropout_output=0.0,
        steps=250,
        learning_rate=0.03,
    )
    train(config, folder / "run", Recorder(), threads=1)
    return folder / "run"


@pytest.fixture(scope="module")
def model_and_tokenizer(run):
    return load_model(run)


def test_greedy_text_is_the_argmax_of_the_whole_sequence(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "".join(generate(model, tokenizer, "the quick", tokens=40, temperature=0))
    ids = tokenizer.encode("the quick").ids
    for _ in range(40):
        logits, _ = model(torch.tensor(ids).unsqueeze(1))
        ids.append(int(logits[-1, 0].argmax()))
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert whole.removesuffix("\ufffd") == ("the quick" + text)
    assert "brown fox" in text


def test_equal_seeds_give_equal_text(model_and_tokenizer):
    texts = ["".join(generate(*model_and_tokenizer, tokens=60, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_narrowest_choices_are_greedy(model_and_tokenizer, narrow):
    greedy = "".join(generate(*model_and_tokenizer, tokens=30, temperature=0))
    assert "".join(generate(*model_and_tokenizer, tokens=30, seed=5, **{"temperature": 2.0, **narrow})) == greedy


def test_generation_streams_in_steps_of_one_token(model_and_tokenizer, monkeypatch):
    model, tokenizer = model_and_tokenizer
    shapes = []
    features = model.features
    monkeypatch.setattr(model, "features", lambda x, s: shapes.append((*x.shape, s is None)) or features(x, s))
    pieces = generate(model, tokenizer, "lazy dog", tokens=20, temperature=0)
    next(pieces)
    assert shapes[0] == (len(tokenizer.encode("lazy dog").ids), 1, True)
    assert 1 <= len(shapes) < 5, "the first piece comes before the text is complete"
    list(pieces)
    assert shapes[1:] == [(1, 1, False)] * 19


def test_pieces_hold_whole_characters(model_and_tokenizer):
    pieces = list(generate(*model_and_tokenizer, "naïve cafés", tokens=60, temperature=0))
    assert len(pieces) > 10
    assert "東京 🦊" in "".join(pieces)
    assert "\ufffd" not in "".join(pieces)


def frequencies(logits, **settings):
    generator = torch.Generator().manual_seed(0)
    arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    draws = [sample(logits, generator=generator, **arguments) for _ in range(4000)]
    return torch.bincount(torch.tensor(draws), minlength=len(logits)) / len(draws)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0}, [0, 1, 0, 0]),
    ],
)
def test_samples_follow_the_distribution(settings, expected):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 50
    measured = frequencies(logits, **settings)
    torch.testing.assert_close(measured, torch.tensor(expected, dtype=torch.float), rtol=0, atol=0.03)
    assert not measured[torch.tensor(expected) == 0].any()


def test_command_prints_prompt_and_text(run, model_and_tokenizer):
    options = ["--prompt", "the quick", "--tokens", "30", "--top-p", "0.9", "--seed", "4", "--threads", "1"]
    result = CliRunner().invoke(app, ["generate", str(run), *options])
    text = "".join(generate(*model_and_tokenizer, "the quick", tokens=30, top_p=0.9, seed=4))
    assert (result.exit_code, result.output) == (0, f"the quick{text}\n")


def test_model_trained_with_nn_lstm_generates(tmp_path):
    config = TINY.replace(data=str(write_text(tmp_path / "text.txt")), steps=2, lstm="torch")
    train(config, tmp_path / "run", Recorder())
    model, tokenizer = load_model(tmp_path / "run" / "checkpoint.safetensors")
    assert isinstance(model.lstm, nn.LSTM)
    assert "".join(generate(model, tokenizer, tokens=20))
