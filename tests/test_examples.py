"""examples/: the policies do what sb3-contrib's own do, with the same parameters and the same saved models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sb3_contrib")

from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from sb3_contrib.ppo_recurrent import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from fastlstm import FastLSTM

EXAMPLES = Path(__file__).parents[1] / "examples"
SEQUENCES, T, H = 5, 9, 16
VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_lstm_layers": 2},
    {"enable_critic_lstm": False},
    {"enable_critic_lstm": False, "shared_lstm": True},
    {"share_features_extractor": False, "lstm_kwargs": {"bias": False}},
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    import recurrent_ppo

    # An update of the real size takes the original policy seconds.
    monkeypatch.setattr(recurrent_ppo, "ENVIRONMENTS", 4)
    for name, value in (("n_steps", 32), ("batch_size", 64), ("n_epochs", 2)):
        monkeypatch.setitem(recurrent_ppo.HYPERPARAMETERS, name, value)
    return recurrent_ppo


def make(
    cls: type[RecurrentActorCriticPolicy], space: spaces.Space[Any] = VECTOR, **options: Any
) -> RecurrentActorCriticPolicy:
    torch.manual_seed(1)
    return cls(space, spaces.Discrete(3), lambda _: 1e-3, lstm_hidden_size=H, net_arch=[8], **options)


def observations(space: spaces.Space[Any], count: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {name: observations(part, count) for name, part in space.items()}
    if space is IMAGE:
        return torch.randint(0, 256, (count, *IMAGE.shape))
    return torch.randn(count, *space.shape)


def states(layers: int) -> RNNStates:
    h_pi, c_pi, h_vf, c_vf = torch.randn(4, layers, SEQUENCES, H)
    return RNNStates((h_pi, c_pi), (h_vf, c_vf))


def episode_starts(share: float = 0.3) -> Tensor:
    return (torch.rand(SEQUENCES * T) < share).float()


def outputs_and_gradients(policy: RecurrentActorCriticPolicy, rollout: tuple[Any, ...]) -> dict[str, Any]:
    """What a training step sees: the gradients are those of all three outputs, averaged over the steps."""
    values, log_prob, entropy = policy.evaluate_actions(*rollout)
    outputs = torch.stack([values.flatten(), log_prob, entropy])
    policy.zero_grad()
    (outputs * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))).mean().backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    return {"outputs": outputs, **gradients}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_outputs_and_gradients_are_the_originals(example, options: dict[str, Any], share: float) -> None:
    original, fast = make(MlpLstmPolicy, **options), make(example.FastMlpLstmPolicy, **options)
    assert isinstance(fast.lstm_actor, FastLSTM)
    assert fast.lstm_critic is None or isinstance(fast.lstm_critic, FastLSTM)
    steps = observations(VECTOR, SEQUENCES * T), torch.randint(3, (SEQUENCES * T,))
    rollout = (*steps, states(options.get("n_lstm_layers", 1)), episode_starts(share))
    torch.testing.assert_close(outputs_and_gradients(fast, rollout), outputs_and_gradients(original, rollout))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_in_the_environments_is_the_originals(example, options: dict[str, Any]) -> None:
    """Actions, values, log-probabilities and the states that go on, by every method that makes a step."""
    original, fast = make(MlpLstmPolicy, **options), make(example.FastMlpLstmPolicy, **options)
    observation, starts = observations(VECTOR, SEQUENCES), torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    before = states(options.get("n_lstm_layers", 1))
    with torch.no_grad():
        made = [policy(observation, before, starts, deterministic=True) for policy in (fast, original)]
        torch.testing.assert_close(*made)
        torch.testing.assert_close(*(p.predict_values(observation, before.vf, starts) for p in (fast, original)))
        made = [policy.get_distribution(observation, before.pi, starts) for policy in (fast, original)]
        torch.testing.assert_close(*((distribution.distribution.probs, after) for distribution, after in made))
    state = tuple(s.numpy() for s in before.pi)
    made = [p.predict(observation.numpy(), state, starts.numpy(), deterministic=True) for p in (fast, original)]
    torch.testing.assert_close(*made)
    # The first step of all has no state.
    made = [policy.predict(observation[0].numpy(), deterministic=True) for policy in (fast, original)]
    torch.testing.assert_close(*made)


@pytest.mark.parametrize(
    ("ours", "theirs", "space"),
    [
        ("FastCnnLstmPolicy", CnnLstmPolicy, IMAGE),
        ("FastMultiInputLstmPolicy", MultiInputLstmPolicy, spaces.Dict(a=VECTOR, b=spaces.Box(-1, 1, (2,)))),
    ],
)
def test_images_and_dicts(example, ours: str, theirs: type[RecurrentActorCriticPolicy], space: Any) -> None:
    original, fast = make(theirs, space), make(getattr(example, ours), space)
    assert isinstance(fast.lstm_actor, FastLSTM) and isinstance(fast, theirs)
    rollout = observations(space, SEQUENCES * T), torch.randint(3, (SEQUENCES * T,)), states(1), episode_starts()
    torch.testing.assert_close(outputs_and_gradients(fast, rollout), outputs_and_gradients(original, rollout))


def test_an_episode_knows_nothing_of_what_was_before(example) -> None:
    policy = make(example.FastMlpLstmPolicy)
    starts = torch.zeros(SEQUENCES, T)
    starts[2, 4] = 1
    observation, actions = observations(VECTOR, SEQUENCES * T), torch.randint(3, (SEQUENCES * T,))
    before = states(1)
    leaves = [state.requires_grad_() for pair in before for state in pair]
    values, log_prob, _ = policy.evaluate_actions(observation, actions, before, starts.flatten())
    values, log_prob = values.view(SEQUENCES, T), log_prob.view(SEQUENCES, T)
    for outputs in (values, log_prob):
        for index, step, reached in ((2, 3, True), (2, 4, False), (2, 8, False), (1, 4, True), (1, 8, True)):
            gradients = torch.autograd.grad(outputs[index, step], leaves, retain_graph=True, allow_unused=True)
            assert any(d is not None and bool(d[:, index].any()) for d in gradients) == reached


def test_padding_changes_no_step(example) -> None:
    """A rollout's sequences are as long as the longest; what is behind an end does not reach what is before."""
    policy = make(example.FastMlpLstmPolicy)
    observation, starts = observations(VECTOR, SEQUENCES * T), episode_starts()
    actions, before = torch.randint(3, (SEQUENCES * T,)), states(1)
    expected = policy.evaluate_actions(observation, actions, before, starts)
    padded = observation.view(SEQUENCES, T, -1).clone()
    padded[:, 6:] = 0
    starts = starts.view(SEQUENCES, T).clone()
    starts[:, 6:] = 0
    made = policy.evaluate_actions(padded.flatten(0, 1), actions, before, starts.flatten())
    for a, b in zip(made, expected, strict=True):
        assert torch.equal(a.view(SEQUENCES, T)[:, :6], b.view(SEQUENCES, T)[:, :6])


def trained(example, policy: type[RecurrentActorCriticPolicy], steps: int) -> RecurrentPPO:
    environments = example.make_environments("CartPole-v1", seed=3)
    return RecurrentPPO(policy, environments, seed=3, device="cpu", **example.HYPERPARAMETERS).learn(steps)


def test_updates_are_the_originals(example) -> None:
    """Rollouts, minibatches and parameters after three updates, in which episodes ended."""
    original, fast = (trained(example, policy, 3 * 32 * 4) for policy in (MlpLstmPolicy, example.FastMlpLstmPolicy))
    buffer, originals = fast.rollout_buffer, original.rollout_buffer
    assert buffer.episode_starts.sum() > 4
    np.testing.assert_array_equal(buffer.actions, originals.actions)
    np.testing.assert_array_equal(buffer.episode_starts, originals.episode_starts)
    np.testing.assert_allclose(buffer.advantages, originals.advantages, rtol=0, atol=1e-5)
    before = trained(example, MlpLstmPolicy, 0).policy.state_dict()
    after = original.policy.state_dict()
    torch.testing.assert_close(fast.policy.state_dict(), after, rtol=0, atol=1e-6)
    assert max((after[name] - before[name]).abs().max() for name in after) > 1e-3


def test_state_dicts_travel_both_ways(example) -> None:
    original, fast = make(MlpLstmPolicy, n_lstm_layers=2), make(example.FastMlpLstmPolicy, n_lstm_layers=2)
    assert list(fast.state_dict()) == list(original.state_dict())
    for source, target in ((original, fast), (fast, original)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        target.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("to_fast", [True, False])
def test_saved_models_load_into_the_other_policy(example, tmp_path: Path, to_fast: bool) -> None:
    policies = [MlpLstmPolicy, example.FastMlpLstmPolicy]
    source, target = policies if to_fast else policies[::-1]
    model = trained(example, source, 128)
    model.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", custom_objects={"policy_class": target}, device="cpu")
    assert type(loaded.policy) is target
    observation = observations(spaces.Box(-1, 1, (4,)), 4).numpy()
    torch.testing.assert_close(
        loaded.predict(observation, deterministic=True), model.predict(observation, deterministic=True)
    )
    loaded.set_env(model.get_env())
    loaded.learn(128)  # the optimizer's state came along
    assert all(parameter.isfinite().all() for parameter in loaded.policy.parameters())


def test_a_feature_extractor_keeps_its_lstm(example) -> None:
    class Extractor(BaseFeaturesExtractor):
        def __init__(self, space: spaces.Box) -> None:
            super().__init__(space, 4)
            self.lstm = nn.LSTM(3, 4)

    policy = make(example.FastMlpLstmPolicy, features_extractor_class=Extractor)
    assert type(policy.features_extractor.lstm) is nn.LSTM


@pytest.mark.parametrize("name", ["batch_first", "bidirectional", "proj_size"])
def test_lstms_of_another_layout_are_refused(example, name: str) -> None:
    with pytest.raises(ValueError, match=f"lstm_kwargs must leave the layout of a plain LSTM, got {name}$"):
        make(example.FastMlpLstmPolicy, lstm_kwargs={name: 1 if name == "proj_size" else True})


def test_the_program_compares_both_policies(example, capsys, tmp_path: Path) -> None:
    path = tmp_path / "ppo.json"
    arguments = ["--compare", "--steps", "250", "--observe", "0", "2", "--target", "10", "--threads", "1"]
    example.main([*arguments, "--seeds", "0", "3", "--json", str(path)])
    header, _, *rows = (line.strip("| ").split() for line in capsys.readouterr().out.splitlines())
    assert header[0] == "policy"
    kinds = [(row[0], row[2]) for row in rows[:-1]]
    runs = [("original", "0"), ("fastlstm", "0"), ("original", "3"), ("fastlstm", "3")]
    assert kinds == [*runs, ("original", "mean"), ("fastlstm", "mean")] and rows[-1][0] == "ratio"
    document = json.loads(path.read_text())
    assert document["machine"] and document["versions"]["sb3_contrib"] and document["flags"]["threads"] == 1
    assert document["settings"] == {"env": "CartPole-v1", "observe": [0, 2], "target": 10.0}
    assert document["hyperparameters"]["n_steps"] == 32
    results = document["results"]
    assert [(result["policy"], str(result["seed"])) for result in results] == runs
    for result in results:
        assert result["steps"] == 256 and result["updates"] == 2
        assert 0 < result["rollout_s"] < result["wall_s"] and 0 < result["update_s"] < result["wall_s"]
        assert result["target_s"] == next(seconds for _, seconds, mean in result["curve"] if mean >= 10)
        assert result["mean_return"] == result["curve"][-1][-1] > 10
    for original, ours in (results[:2], results[2:]):
        assert original["mean_return"] == ours["mean_return"]  # the same episodes so far
    means = [sum(result["mean_return"] for result in results[i::2]) / 2 for i in range(2)]
    assert [row[4] for row in rows[4:6]] == [f"{mean:.1f}" for mean in means]


def test_the_program_trains_one_policy(example, capsys) -> None:
    example.main(["--policy", "fastlstm", "--env", "Pendulum-v1", "--steps", "128", "--seeds", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert "s to its target" in lines[0]
    # No episode of 200 steps has ended, and there is no target.
    assert len(lines) == 3 and lines[2].split()[1::2][:3] == ["fastlstm", "5", "-"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "NoSuchEnvironment-v0"], "`NoSuchEnvironment` doesn't exist"),
        (["--observe", "4"], "observe must be of elements 0 to 3, got [4]"),
        (["--env", "FrozenLake-v1", "--observe", "0"], "observe needs an environment whose observations are vectors"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--json", "/nowhere/ppo.json"], "cannot write /nowhere/ppo.json"),
    ],
)
def test_mistakes_in_the_arguments(example, capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit:
        example.main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err
