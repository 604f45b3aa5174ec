"""Two processes compute what one does with the joined batch: FastLSTM in DDP and FSDP2, and the language model.

Functions whose names begin with `in_each` run in both processes at once (process_pair.py).
"""

import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from lm_setup import SIZES, TINY, Recorder, Stopper, prepare, write_text
from process_pair import THREADS_BEFORE, ProcessPair
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from fastlstm import FastLSTM
from fastlstm.lm.checkpoint import load_checkpoint
from fastlstm.lm.config import LanguageModelError
from fastlstm.lm.data import open_token_file
from fastlstm.lm.parallel import ALONE
from fastlstm.lm.train import Interrupted, Trainer, resume, train

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")

# A shape that no shard divides evenly: the projection has 3 rows.
LSTM = partial(FastLSTM, 5, 7, num_layers=2, bidirectional=True, proj_size=3, dtype=torch.float64)


@pytest.fixture(scope="module")
def pair():
    pair = ProcessPair()
    yield pair
    pair.stop()


class Model(nn.Module):
    """FastLSTM between two linear layers."""

    def __init__(self):
        super().__init__()
        self.below = nn.Linear(5, 5, dtype=torch.float64)
        self.lstm = LSTM()
        self.above = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, x, hx=None, **options):
        y, states = self.lstm(self.below(x), hx, **options)
        return self.above(y), states


class Checkpointed(Model):
    """The same, with the LSTM's activations computed again in the backward pass."""

    def forward(self, x, hx=None):
        y, states = checkpoint(self.lstm, self.below(x), hx, use_reentrant=False)
        return self.above(y), states


class Packed(nn.Module):
    """Takes and returns a PackedSequence."""

    def __init__(self):
        super().__init__()
        self.lstm = LSTM()

    def forward(self, x):
        return self.lstm(x)[0]


def shard(module, **options):
    """`module` in FSDP2; the LSTM in it is a group of its own that drops its weights between forward and backward."""
    options["mesh"] = distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
    for child in module.children():
        fully_shard(child, reshard_after_forward=True, **options)
    return fully_shard(module, reshard_after_forward=True, **options)


def compiled(module):
    torch.compiler.reset()
    return torch.compile(DistributedDataParallel(module), backend="aot_eager")


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp static_graph": partial(DistributedDataParallel, static_graph=True),
    "ddp gradient_as_bucket_view": partial(DistributedDataParallel, gradient_as_bucket_view=True),
    "ddp compiled": compiled,
    "fsdp": shard,
}
MAIN_WRAPPERS = ["ddp", "ddp static_graph", "fsdp"]
SPECIAL_CASES = [("ddp gradient_as_bucket_view", Model), ("ddp compiled", Model)]


def whole(tensor):
    """The tensor that the processes hold shards of."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean(group, loss):
    return group.sums(loss.item())[0] / group.size


def assert_same_gradients(wrapped, alone, factor=1.0):
    compared = 0
    for (name, ours), expected in zip(wrapped.named_parameters(), alone.parameters(), strict=True):
        if expected.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(whole(ours.grad) * factor, expected.grad, msg=partial("{}: {}".format, name))
            compared += 1
    assert compared


def in_each_training_equals_that_of_one_process(group, wrapper, make):
    alone = make()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(alone))
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in (alone, wrapped)]
    columns = group.columns(6)
    for step in range(4):  # DDP arranges its buckets anew after the first
        x = torch.randn(3 + step, 6, 5, dtype=torch.float64)
        hx = (torch.randn(4, 6, 3, dtype=torch.float64), torch.randn(4, 6, 7, dtype=torch.float64))
        y, (_, c_n) = alone(x, hx)
        target, c_target = torch.randn_like(y), torch.randn_like(c_n)
        expected = F.mse_loss(y, target) + F.mse_loss(c_n, c_target)
        y, (_, c_n) = wrapped(x[:, columns], tuple(state[:, columns] for state in hx))
        loss = F.mse_loss(y, target[:, columns]) + F.mse_loss(c_n, c_target[:, columns])
        assert mean(group, loss) == pytest.approx(expected.item(), rel=1e-12)
        for optimizer, value in zip(optimizers, (expected, loss), strict=True):
            optimizer.zero_grad()
            value.backward()
        assert_same_gradients(wrapped, alone)
        for optimizer in optimizers:
            optimizer.step()
    for ours, expected in zip(wrapped.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), expected)


@pytest.mark.parametrize(
    ("wrapper", "make"), [*itertools.product(MAIN_WRAPPERS, [LSTM, Model, Checkpointed]), *SPECIAL_CASES]
)
def test_training_equals_that_of_one_process(wrapper, make, pair):
    pair.run(in_each_training_equals_that_of_one_process, wrapper, make)


def in_each_sequences_of_different_lengths(group, wrapper, packed):
    alone = Packed() if packed else Model()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(alone))
    x, lengths = torch.randn(5, 6, 5, dtype=torch.float64), torch.tensor([5, 2, 4, 1, 3, 2])

    def loss(model, columns):
        if packed:
            return (
                model(pack_padded_sequence(x[:, columns], lengths[columns], enforce_sorted=False)).data.square().sum()
            )
        y, (h_n, _) = model(x[:, columns], lengths=lengths[columns])
        return y.square().sum() + h_n.square().sum()

    expected, ours = loss(alone, slice(None)), loss(wrapped, group.columns(6))
    torch.testing.assert_close(mean(group, ours) * group.size, expected.item())
    expected.backward()
    ours.backward()
    assert_same_gradients(wrapped, alone, factor=group.size)


@pytest.mark.parametrize("packed", [False, True], ids=["lengths", "packed"])
@pytest.mark.parametrize("wrapper", MAIN_WRAPPERS)
def test_sequences_of_different_lengths(wrapper, packed, pair):
    pair.run(in_each_sequences_of_different_lengths, wrapper, packed)


def in_each_gradients_are_accumulated(group, wrapper):
    alone = Model()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(alone))
    x = torch.randn(5, 12, 5, dtype=torch.float64)
    alone(x)[0].square().sum().backward()
    first, second = (half[:, group.columns(6)] for half in x.split(6, dim=1))
    if wrapper == "fsdp":
        wrapped.set_requires_gradient_sync(False)
        wrapped(first)[0].square().sum().backward()
        wrapped.set_requires_gradient_sync(True)
    else:
        with wrapped.no_sync():
            wrapped(first)[0].square().sum().backward()
    wrapped(second)[0].square().sum().backward()
    assert_same_gradients(wrapped, alone, factor=group.size)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_are_accumulated(wrapper, pair):
    pair.run(in_each_gradients_are_accumulated, wrapper)


class PartlyUsed(Model):
    """A model with frozen weights and a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.unused = LSTM()
        self.lstm.weight_hh_l0.requires_grad_(False)
        self.lstm.bias_ih_l1_reverse.requires_grad_(False)


def in_each_frozen_and_unused_weights(group, wrapper):
    alone = PartlyUsed()
    options = {"find_unused_parameters": True} if wrapper == "ddp" else {}
    wrapped = WRAPPERS[wrapper](copy.deepcopy(alone), **options)
    x = torch.randn(5, 6, 5, dtype=torch.float64)
    for _ in range(2):
        alone(x)[0].square().sum().backward()
        wrapped(x[:, group.columns(6)])[0].square().sum().backward()
    assert_same_gradients(wrapped, alone, factor=group.size)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_frozen_and_unused_weights(wrapper, pair):
    pair.run(in_each_frozen_and_unused_weights, wrapper)


def in_each_fsdp_computes_in_bfloat16(group):
    alone = FastLSTM(5, 7, num_layers=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrapped = shard(copy.deepcopy(alone), mp_policy=policy)
    x, hx = torch.randn(5, 6, 5), (torch.randn(2, 6, 7), torch.randn(2, 6, 7))
    expected = [torch.zeros_like(p) for p in alone.parameters()]
    for rank in range(group.size):
        columns = type(group)(rank, group.size).columns(6)
        module = copy.deepcopy(alone).bfloat16()
        y, states = module(x[:, columns].bfloat16(), tuple(state[:, columns].bfloat16() for state in hx))
        y.square().sum().backward()
        for total, parameter in zip(expected, module.parameters(), strict=True):
            total += parameter.grad.float() / group.size
        if rank == group.rank:
            own = y, states
    y, states = wrapped(x[:, group.columns(6)], tuple(state[:, group.columns(6)] for state in hx))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close((y, states), own, rtol=0, atol=0)
    y.square().sum().backward()
    for parameter, gradient in zip(wrapped.parameters(), expected, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        torch.testing.assert_close(whole(parameter.grad), gradient, rtol=0, atol=0)


def test_fsdp_computes_in_bfloat16(pair):
    pair.run(in_each_fsdp_computes_in_bfloat16)


def in_each_sharded_weights_are_refused(group):
    wrapped = shard(Model())
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"lstm.* got mixed torch\.Tensor and DTensor"):
        wrapped.lstm.forward(x)
    wrapped.lstm(x)


def test_a_forward_method_called_past_the_hooks_of_fsdp_is_refused(pair):
    pair.run(in_each_sharded_weights_are_refused)


# The language model

NO_DROPOUT = TINY.replace(dropout_input=0.0, dropout_hidden=0.0, dropout_output=0.0)


def in_each_trainer_equals_a_single_one(group, config, tokens_path):
    tokens = open_token_file(tokens_path, config.validation_fraction)
    alone, ours = Trainer(config, tokens, FastLSTM), Trainer(config, tokens, FastLSTM, group)
    assert len(ours.batches) < config.steps, "the test has to pass the end of the text"
    for _ in range(config.steps):
        assert ours.train_step() == pytest.approx(alone.train_step(), rel=1e-6)
    assert ours.perplexity() == pytest.approx(alone.perplexity(), rel=1e-6)
    ours, expected = ours.tensors(), alone.tensors()
    assert ours.keys() - expected.keys() == {"random.1"}
    for name in expected.keys() - {"random"}:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))


# The validation part of the shorter text has a single lane: one process has nothing to validate on.
@pytest.mark.parametrize(("lines", "lanes"), [(15, 1), (60, 4)])
def test_trainer_equals_a_single_one(lines, lanes, pair, tmp_path):
    config, tokens = prepare(tmp_path, NO_DROPOUT.replace(steps=40, clip_norm=0.1), lines)
    validation = Trainer(config, tokens, FastLSTM).validation_batches
    assert validation[0][0].size(1) == lanes
    pair.run(in_each_trainer_equals_a_single_one, config, tmp_path / "tokens.bin")


def in_each_interrupted_and_resumed(group, config, folder):
    whole = Recorder()
    train(config, folder / "whole", whole, group=group)
    parts = [Stopper(5, signal.SIGINT) if group.rank == 1 else Recorder(), Recorder()]
    with pytest.raises(Interrupted, match="after step 5") as interruption:
        train(config, folder / "parts", parts[0], group=group)
    assert interruption.value.signum == signal.SIGINT
    torch.rand(group.rank)  # whatever happens in between
    resume(folder / "parts", parts[1], group=group)
    assert parts[0].losses + parts[1].losses == whole.losses
    assert parts[0].perplexities | parts[1].perplexities == whole.perplexities
    return whole.losses


def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(pair, tmp_path):
    """A signal to one process stops both at the same step; the rest is exact, dropout included."""
    config = TINY.replace(data=str(write_text(tmp_path / "text.txt")))
    losses = pair.run(in_each_interrupted_and_resumed, config, tmp_path)
    assert losses[0] == losses[1] and len(losses[0]) == config.steps
    ends = [load_checkpoint(tmp_path / run / "checkpoint.safetensors") for run in ("parts", "whole")]
    assert ends[0].progress == ends[1].progress
    assert ends[0].progress.processes == 2
    assert ends[0].tensors.keys() == ends[1].tensors.keys()
    assert [name for name, tensor in ends[0].tensors.items() if not torch.equal(tensor, ends[1].tensors[name])] == []
    assert not torch.equal(ends[0].tensors["random"], ends[0].tensors["random.1"])
    assert ends[0].tensors["state.h"].size(1) == config.batch_size
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["checkpoint.safetensors", "tokens.bin"]


def in_each_until_interrupted(group, config, folder):
    observer = Stopper(7, signal.SIGTERM)
    with pytest.raises(Interrupted, match="after step 7"):
        train(config, folder, observer, group=group)
    return observer.losses


def in_each_resumed(group, folder):
    observer = Recorder()
    resume(folder, observer, group=group)
    return observer.losses


@pytest.mark.parametrize("first", ["one process", "two processes"])
def test_resumption_with_another_number_of_processes(first, pair, tmp_path):
    config = NO_DROPOUT.replace(data=str(write_text(tmp_path / "text.txt")))
    whole, run = Recorder(), tmp_path / "run"
    train(config, tmp_path / "whole", whole)
    if first == "one process":
        losses = in_each_until_interrupted(ALONE, config, run) + pair.run(in_each_resumed, run)[0]
    else:
        losses = pair.run(in_each_until_interrupted, config, run)[0] + in_each_resumed(ALONE, run)
    assert losses == pytest.approx(whole.losses, rel=1e-6)


def in_each_mistakes_are_told_to_all(group, config, folder):
    with pytest.raises(LanguageModelError, match="must be a multiple of the number of processes, got 3 and 2"):
        train(config.replace(batch_size=3), folder, Recorder(), overwrite=True, group=group)
    # Only the main process looks at the folder.
    with pytest.raises(LanguageModelError, match="has a checkpoint already"):
        train(config, folder, Recorder(), group=group)
    with pytest.raises(LanguageModelError, match="no checkpoint"):
        resume(folder / "none", Recorder(), group=group)

    def fail_in_process_1():
        if group.rank == 1:
            raise OSError("disk on fire")

    error, message = (OSError, "disk") if group.rank == 1 else (LanguageModelError, r"process 1 failed: OSError\('disk")
    with pytest.raises(error, match=message):
        group.main_first(fail_in_process_1)

    def fail_to_save(path, checkpoint):
        raise OSError("no space left")

    # Only the main process writes.
    with mock.patch("fastlstm.lm.train.save_checkpoint", fail_to_save):
        error, message = (
            (OSError, "^no space") if group.is_main else (LanguageModelError, r"process 0 failed: OSError\('no")
        )
        with pytest.raises(error, match=message):
            resume(folder, Recorder(), group=group)
    with pytest.raises(LanguageModelError, match="diverged"):
        diverging = config.replace(learning_rate=1e37, warmup_steps=0, steps=12)
        train(diverging, folder.with_name("diverging"), Recorder(), group=group)


def test_mistakes_are_told_to_all(pair, tmp_path):
    config = TINY.replace(data=str(write_text(tmp_path / "text.txt")), steps=1)
    train(config, tmp_path / "run", Recorder())
    before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    pair.run(in_each_mistakes_are_told_to_all, config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before


def test_processes_share_the_threads(pair):
    pair.run(in_each_knows_its_rank)
    assert pair.threads == [THREADS_BEFORE // 2] * 2


def in_each_knows_its_rank(group):
    assert (group.rank, group.size) == (distributed.get_rank(), distributed.get_world_size())


def test_torchrun_trains_speaks_once_and_stops_at_a_signal(tmp_path):
    run = tmp_path / "run"
    path = run / "checkpoint.safetensors"
    options = [f"--data={write_text(tmp_path / 'text.txt')}", *SIZES, "--steps=100000", "--save-every=20"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fastlstm", "train", f"--out={run}", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    deadline = time.monotonic() + 120
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while not path.exists() or load_checkpoint(path).progress.step == 0:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step within two minutes"
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.terminate()  # not killed: torchrun ends the processes it started
        process.wait(timeout=60)
    progress = load_checkpoint(path).progress
    assert (progress.processes, progress.threads) == (2, 1)
    assert output.count("text: ") == output.count("2 processes; lanes of each: 2, threads of each: 1") == 1
    ours = [line for line in errors.splitlines() if line.startswith("fastlstm: ")]
    assert ours == [f"fastlstm: interrupted after step {progress.step}; checkpoint: {path}"]
    assert "fastlstm/lm" not in errors, "a process ended with a traceback"
