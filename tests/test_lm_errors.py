"""Mistakes of a user of the language model: one clear line, a non-zero exit status, nothing overwritten."""

import pytest
import torch
from lm_setup import SIZES, TINY, Recorder, write_text
from safetensors.torch import save_file
from typer.testing import CliRunner

from fastlstm.cli import app
from fastlstm.lm.checkpoint import load_checkpoint, save_checkpoint
from fastlstm.lm.config import LanguageModelError
from fastlstm.lm.generate import generate, load_model
from fastlstm.lm.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run and the text it was trained on."""
    folder = tmp_path_factory.mktemp("errors")
    config = TINY.replace(data=str(write_text(folder / "text.txt")), steps=4)
    train(config, folder / "run", Recorder(), threads=1)
    return folder


@pytest.fixture
def work(trained, tmp_path):
    """A copy of it that a test may spoil: text.txt, run/checkpoint.safetensors, run/tokens.bin."""
    (tmp_path / "run").mkdir()
    for name in ("text.txt", "run/checkpoint.safetensors", "run/tokens.bin"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    return tmp_path


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(work, arguments, message):
    """The command fails with one line that holds `message`, and leaves every file as it was."""
    before = snapshot(work)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastlstm: "), result.stderr
    assert message in lines[0]
    assert snapshot(work) == before


def damage(work, kind):
    path = work / "run" / "checkpoint.safetensors"
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(content[:-100])
    elif kind == "flipped bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "torch.save":
        torch.save({"model": torch.zeros(3)}, path)
    elif kind == "foreign safetensors":
        save_file({"model": torch.zeros(3)}, path)
    return path


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "damaged, or not a checkpoint"),
        ("truncated", "damaged, or not a checkpoint"),
        ("flipped bit", "do not match its digest"),
        ("text", "damaged, or not a checkpoint"),
        ("torch.save", "damaged, or not a checkpoint"),
        ("foreign safetensors", "not a checkpoint of the format"),
    ],
)
def test_damaged_and_foreign_checkpoints(work, command, kind, message):
    damage(work, kind)
    run = str(work / "run")
    arguments = ["train", "--out", run, "--resume"] if command == "train" else ["generate", run]
    assert_refused(work, arguments, message)


def test_checkpoint_that_does_not_fit_its_configuration(work):
    path = work / "run" / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path)
    del checkpoint.tensors["model.softmax_bias"]
    save_checkpoint(path, checkpoint)
    for arguments in (["train", "--out", str(work / "run"), "--resume"], ["generate", str(work / "run")]):
        assert_refused(work, arguments, "does not fit its configuration")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "21"], "cannot resume with another hidden_size: the checkpoint has 20, got 21"),
        (["--lr", "0.5"], "cannot resume with another learning_rate: the checkpoint has 0.02, got 0.5"),
        (["--preset", "awd"], "cannot resume with another preset: the checkpoint has tiny, got awd"),
        (["--data", "stdlib"], "cannot resume with another data"),
        (["--lstm", "torch"], "cannot resume with another lstm: the checkpoint has fastlstm, got torch"),
        (["--steps", "3"], "steps is 3, but the checkpoint is at step 4 already"),
        (["--overwrite"], "--resume and --overwrite exclude each other"),
    ],
)
def test_resuming_with_other_settings(work, options, message):
    assert_refused(work, ["train", "--out", str(work / "run"), "--resume", *options], message)


def test_resuming_without_a_checkpoint(work):
    assert_refused(work, ["train", "--out", str(work / "none"), "--resume"], "no checkpoint")
    assert_refused(work, ["generate", str(work / "none")], "no checkpoint")
    assert_refused(work, ["generate", str(work)], "no checkpoint")


def test_existing_run_is_kept_without_overwrite(work):
    arguments = [
        "train",
        "--data",
        str(work / "text.txt"),
        "--out",
        str(work / "run"),
        *SIZES,
        "--steps",
        "2",
    ]
    assert_refused(work, arguments, "has a checkpoint already: --resume goes on with it, --overwrite drops it")
    result = CliRunner().invoke(app, [*arguments, "--overwrite", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert load_checkpoint(work / "run" / "checkpoint.safetensors").progress.step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "nope"], "unknown preset 'nope'; known presets: seed, char, awd"),
        (["--data", "MISSING"], "no such file or folder"),
        (["--data", "EMPTY"], "the file is empty"),
        (["--data", "BINARY"], "not a text file (UTF-8 without NUL bytes)"),
        (["--data", "FOLDER"], "no text in the folder"),
        (["--vocab", "10000"], "vocab_size is 10000, but the text gives only"),
        (["--tokenizer", "char", "--vocab", "500"], "vocab_size is 500, but the text gives only"),
        (["--vocab", "100"], "vocab_size must be at least 257 for the tokenizer 'bpe', got 100"),
        (["--batch-size", "5000"], "are too few for batch_size 5000"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--steps", "-1"], "steps must be at least 1, got -1"),
        (["--hidden", "0"], "hidden_size must be at least 1, got 0"),
        (["--lr", "0"], "learning_rate must be positive and finite, got 0"),
        (["--lr", "nan"], "learning_rate must be positive and finite, got nan"),
        (["--clip", "-1"], "clip_norm must be positive and finite, got -1"),
        (["--dropout", "1"], "dropout_input must be in [0, 1), got 1"),
        (["--tokenizer", "words"], "tokenizer must be 'bpe' or 'char', got 'words'"),
        (["--lstm", "cudnn"], "lstm must be 'fastlstm' or 'torch', got 'cudnn'"),
        (["--seed", "-1"], "seed must be in [0, 2**63), got -1"),
        (["--lr", "1e37"], "training diverged"),
    ],
)
def test_bad_settings_and_texts_leave_an_existing_run_alone(work, options, message):
    (work / "EMPTY").touch()
    (work / "BINARY").write_bytes(bytes(range(256)) * 10)
    (work / "FOLDER").mkdir()
    (work / "FOLDER" / "image.png").write_bytes(b"\x89PNG\0\0")
    options = [str(work / o) if o.isupper() else o for o in options]
    out = work / "new" if "1e37" in options else work / "run"
    arguments = [
        "train",
        "--data",
        str(work / "text.txt"),
        *SIZES,
        "--out",
        str(out),
        "--overwrite",
        *options,
    ]
    if "1e37" in options:  # this mistake shows only in training: the new run's first checkpoint stays
        result = CliRunner().invoke(app, [*arguments, "--threads", "1"])
        assert result.exit_code == 1
        assert message in result.stderr
        assert load_checkpoint(out / "checkpoint.safetensors").progress.step == 0
        return
    assert_refused(work, arguments, message)


def test_folder_that_cannot_be_made(work):
    arguments = ["train", "--data", str(work / "text.txt"), *SIZES, "--out", str(work / "text.txt")]
    assert_refused(work, arguments, "text.txt")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be zero or positive, and finite, got -0.1"),
        ("temperature", float("nan"), "temperature must be zero or positive, and finite, got nan"),
        ("top_k", -1, "top_k must be zero or positive, got -1"),
        ("top_p", 0.0, "top_p must be in (0, 1], got 0.0"),
        ("top_p", 1.5, "top_p must be in (0, 1], got 1.5"),
        ("tokens", 0, "tokens must be at least 1, got 0"),
        ("seed", -1, "seed must be in [0, 2**63), got -1"),
    ],
)
def test_generation_arguments(trained, argument, value, message):
    model, tokenizer = load_model(trained / "run")
    with pytest.raises(LanguageModelError) as error:
        generate(model, tokenizer, **{argument: value})
    assert str(error.value) == message
    option = f"--{argument.replace('_', '-')}={value}"
    assert_refused(trained, ["generate", str(trained / "run"), option], message)


def test_failed_save_keeps_the_old_checkpoint(work):
    path = work / "run" / "checkpoint.safetensors"
    checkpoint = load_checkpoint(path)
    checkpoint.tensors["model.softmax_bias"][0] = float("nan")
    before = snapshot(work)
    with pytest.raises(LanguageModelError, match=r"model\.softmax_bias is not finite after step 4; not saved"):
        save_checkpoint(path, checkpoint)
    assert snapshot(work) == before
