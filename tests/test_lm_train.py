"""The model, its loss, and training: exact resumption above all."""

import math
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from lm_setup import SIZES, TINY, Recorder, Stopper, prepare, write_text
from torch import nn
from typer.testing import CliRunner

from fastlstm import FastLSTM
from fastlstm.cli import app
from fastlstm.lm import model as model_module
from fastlstm.lm.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from fastlstm.lm.config import PRESETS, Config, LanguageModelError
from fastlstm.lm.model import LSTMLanguageModel, linear_cross_entropy, unigram_log_probabilities
from fastlstm.lm.train import Interrupted, Trainer, resume, train


def assert_equal_tensors(ours, expected):
    assert ours.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(ours[name], expected[name])]
    assert different == []


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_linear_cross_entropy_and_its_gradients(rows_at_once, monkeypatch):
    vocab_size = 11
    monkeypatch.setattr(model_module, "CHUNK_LOGITS", rows_at_once * vocab_size)
    targets = torch.randint(vocab_size, (7,))
    arguments = [torch.randn(size, dtype=torch.double, requires_grad=True) for size in ((7, 5), (11, 5), (11,))]
    ours = linear_cross_entropy(*arguments, targets)
    expected = F.cross_entropy(F.linear(*arguments), targets)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(2 * loss, arguments) for loss in (ours, expected))
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*arguments, targets), ours)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_model_shapes_and_loss(tie_weights):
    config = TINY.replace(tie_weights=tie_weights)
    model = LSTMLanguageModel(config, FastLSTM).eval()
    tokens, targets = torch.randint(config.vocab_size, (2, 6, 3))
    logits, (h, c) = model(tokens)
    assert logits.shape == (6, 3, config.vocab_size)
    assert h.shape == c.shape == (2, 3, config.hidden_size)
    loss, _ = model.loss(tokens, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    halves = [model(tokens[:2])]
    halves.append(model(tokens[2:], halves[0][1]))
    torch.testing.assert_close(torch.cat([half for half, _ in halves]), logits)
    assert ("softmax_weight" in dict(model.named_parameters())) is not tie_weights


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_with_both_lstms(name):
    config = PRESETS[name].replace(vocab_size=300)
    with torch.device("meta"):
        models = [LSTMLanguageModel(config, lstm) for lstm in (FastLSTM, nn.LSTM)]
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    assert Config.from_json(config.to_json()) == config


def test_unigram_model_and_perplexity_are_what_they_say(tmp_path):
    log_p = unigram_log_probabilities(torch.tensor([2, 2, 0, 2], dtype=torch.int32), 4)
    torch.testing.assert_close(log_p.exp(), torch.tensor([2, 1, 4, 1], dtype=torch.double) / 8)
    config, tokens = prepare(tmp_path)
    trainer = Trainer(config, tokens, nn.LSTM)
    batches = list(trainer.validation_batches)
    targets = torch.cat([y for _, y in batches]).flatten()
    assert trainer.unigram_perplexity() == pytest.approx(math.exp(-trainer.unigram[targets].mean()))
    trainer.model.eval()
    logits, _ = trainer.model(torch.cat([x for x, _ in batches]))
    expected = F.cross_entropy(logits.flatten(0, 1), torch.cat([y for _, y in batches]).flatten())
    assert trainer.perplexity() == pytest.approx(expected.exp().item(), rel=1e-5)


def test_schedule_rises_and_falls():
    steps, warmup = 100, 10
    config = TINY.replace(steps=steps, warmup_steps=warmup, learning_rate=1.0)
    trainer = Trainer.__new__(Trainer)
    trainer.config = config
    rates = [trainer.learning_rate(step) for step in range(steps + 1)]
    assert rates[: warmup + 1] == pytest.approx([*(n / 10 for n in range(1, 11)), 1.0])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_training_learns_and_both_lstms_agree(tmp_path):
    config, tokens = prepare(tmp_path, TINY.replace(dropout_hidden=0.0, dropout_input=0.0, dropout_output=0.0))
    config = config.replace(steps=60, learning_rate=0.03)
    trainers = [Trainer(config, tokens, lstm) for lstm in (FastLSTM, nn.LSTM)]
    losses = [[trainer.train_step() for _ in range(config.steps)] for trainer in trainers]
    torch.testing.assert_close(losses[0][:20], losses[1][:20], rtol=0, atol=1e-4)
    for trainer in trainers:
        assert trainer.perplexity() < 0.5 * trainer.unigram_perplexity()


@pytest.mark.parametrize("lstm", [FastLSTM, nn.LSTM])
@pytest.mark.parametrize("stop", [1, 7])
def test_resumed_trainer_repeats_the_losses_bit_for_bit(lstm, stop, tmp_path):
    config, tokens = prepare(tmp_path, lines=15)
    whole = Trainer(config, tokens, lstm)
    assert len(whole.batches) < config.steps, "the test has to pass the end of the text"
    losses = [whole.train_step() for _ in range(config.steps)]

    first = Trainer(config, tokens, lstm)
    losses_again = [first.train_step() for _ in range(stop)]
    progress = Progress(stop, 0, None, tokens.sha256, 1)
    save_checkpoint(tmp_path / "c", Checkpoint(config, "{}", progress, first.tensors()))
    torch.rand(5)  # whatever happens in between
    loaded = load_checkpoint(tmp_path / "c")
    assert (loaded.config, loaded.progress) == (config, progress)
    second = Trainer(loaded.config, tokens, lstm)
    second.load(loaded.tensors, loaded.progress.step)
    losses_again += [second.train_step() for _ in range(config.steps - stop)]

    assert losses_again == losses
    assert_equal_tensors(second.tensors(), whole.tensors())


# Step 5 is followed by a validation, which the signal prevents: it is made up for after the resumption.
@pytest.mark.parametrize(("step", "signum"), [(5, signal.SIGINT), (7, signal.SIGTERM)])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(step, signum, tmp_path):
    config = TINY.replace(data=str(write_text(tmp_path / "text.txt")))
    whole = Recorder()
    train(config, tmp_path / "whole", whole)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    parts = [Stopper(step, signum), Recorder()]
    with pytest.raises(Interrupted, match=f"after step {step}") as interruption:
        train(config, tmp_path / "parts", parts[0])
    assert interruption.value.signum == signum
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.safetensors").progress.step == step
    resume(tmp_path / "parts", parts[1])

    assert parts[0].losses + parts[1].losses == whole.losses
    assert parts[0].perplexities | parts[1].perplexities == whole.perplexities
    assert list(whole.perplexities) == [5, 10, 12]
    ends = [load_checkpoint(tmp_path / run / "checkpoint.safetensors") for run in ("parts", "whole")]
    assert ends[0].progress == ends[1].progress
    assert_equal_tensors(ends[0].tensors, ends[1].tensors)
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["checkpoint.safetensors", "tokens.bin"]


def test_resumption_needs_the_text_only_if_the_token_file_is_gone(tmp_path):
    text, run = write_text(tmp_path / "text.txt"), tmp_path / "run"
    config = TINY.replace(data=str(text), steps=4)
    train(config, run, Recorder())
    text.rename(tmp_path / "away.txt")
    resume(run, Recorder(), overrides={"steps": 6})
    (run / "tokens.bin").write_bytes(b"\0" * 400)
    with pytest.raises(LanguageModelError, match="no such file or folder"):
        resume(run, Recorder(), overrides={"steps": 8})
    (tmp_path / "away.txt").rename(text)
    observer = Recorder()
    resume(run, observer, overrides={"steps": 8})
    assert len(observer.losses) == 2
    (run / "tokens.bin").unlink()
    text.write_text("something else " * 1000)
    with pytest.raises(LanguageModelError, match="changed since the run started"):
        resume(run, Recorder(), overrides={"steps": 9})


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_the_command_leaves_a_checkpoint_that_resumes(signum, status, tmp_path):
    run = tmp_path / "run"
    path = run / "checkpoint.safetensors"
    options = [f"--data={write_text(tmp_path / 'text.txt')}", *SIZES, "--steps=1000000", "--save-every=40"]
    command = [sys.executable, "-m", "fastlstm", "train", f"--out={run}", "--threads=1", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    # A checkpoint is complete whenever it is read.
    while not path.exists() or load_checkpoint(path).progress.step == 0:
        assert process.poll() is None, "the command ended by itself"
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    step = load_checkpoint(path).progress.step
    assert errors == f"fastlstm: interrupted after step {step}; checkpoint: {path}\n"
    resumed = CliRunner().invoke(app, ["train", f"--out={run}", "--resume", f"--steps={step + 3}"])
    assert resumed.exit_code == 0, resumed.output
    assert f"resumed {run} at step {step:,}" in resumed.output
    assert load_checkpoint(path).progress.step == step + 3


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = TINY.replace(data=str(write_text(tmp_path / "text.txt")), learning_rate=1e37, warmup_steps=0)
    with pytest.raises(LanguageModelError, match="diverged"):
        train(config, tmp_path / "run", Recorder())
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())
