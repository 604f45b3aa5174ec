"""The demonstration, with a tiny model: it passes, and it fails where something is wrong."""

import io

import pytest
from lm_setup import TINY, Recorder, write_text
from rich.console import Console

from fastlstm.lm import demo
from fastlstm.lm.demo import run_demo


def run(tmp_path, **settings):
    config = TINY.replace(
        data=str(write_text(tmp_path / "text.txt")),
        dropout_input=0.0,
        dropout_hidden=0.0,
        dropout_output=0.0,
        learning_rate=0.02,
    )
    observer, output = Recorder(), io.StringIO()
    console = Console(file=output, width=110)
    failures = run_demo(observer, console, seconds=1, timing_s=0.1, config=config, **settings)
    return failures, observer, output.getvalue()


def test_demo_shows_verification_losses_speed_and_a_sample(tmp_path):
    failures, observer, output = run(tmp_path, steps=60)
    assert failures == []
    assert len(observer.losses) == 2 * 60
    assert observer.losses[:50] == pytest.approx(observer.losses[60:110], abs=1e-4)
    for tensor in ("y", "h_n", "c_n", "d_x", "d_weight_ih_l0", "d_weight_hh_l1", "d_bias_hh_l1"):
        assert any(line.split()[:1] == [tensor] and line.split()[-1] == "ok" for line in output.splitlines())
    notes = "\n".join(observer.notes)
    for part in ("validation perplexity: ", "unigram model", "largest difference of the losses", "softmax over 280"):
        assert part in notes
    assert "whole model" in output and "LSTM alone" in output
    assert "│ The " in output


@pytest.mark.parametrize(
    ("bound", "message"), [("EARLY_BOUND", "in the first 50 steps, more than"), ("LATE_BOUND", "more than -1")]
)
def test_demo_reports_loss_curves_that_part(tmp_path, monkeypatch, bound, message):
    monkeypatch.setattr(demo, bound, -1.0)
    failures, _, _ = run(tmp_path, steps=10)
    assert any(message in failure for failure in failures)


def test_demo_reports_a_model_that_does_not_beat_the_unigram_model(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.Trainer, "unigram_perplexity", lambda self: 1.0)
    failures, _, _ = run(tmp_path, steps=10)
    assert len(failures) == 1 and "is not below the unigram model's 1.0" in failures[0]
