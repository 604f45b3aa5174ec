"""RecurrentPPO of sb3-contrib with FastLSTM: policies without a Python loop over time steps.

    python examples/recurrent_ppo.py --env CartPole-v1 --steps 100000 --policy fastlstm
    python examples/recurrent_ppo.py --compare --threads 1 --seeds 0 1 2 3 4 --json FILE

sb3-contrib's recurrent policies run nn.LSTM step by step as soon as an episode starts anywhere in a batch of sequences,
which in training it nearly always does. The policies here pass the starts to FastLSTM as `reset_mask`: one call for the
whole batch. Everything else is sb3-contrib's own, parameters and saved models included:

    model = RecurrentPPO(FastMlpLstmPolicy, env)
    model = RecurrentPPO.load(path, custom_objects={"policy_class": FastMlpLstmPolicy})

Run as a program, it trains with either policy, by the same hyperparameters and seeds, and says where the time goes.
Needs `pip install "fastlstm[examples]"`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import sb3_contrib
import stable_baselines3
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.ppo_recurrent import CnnLstmPolicy, MlpLstmPolicy, MultiInputLstmPolicy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from fastlstm import FastLSTM, swap_lstm
from fastlstm.bench import record
from fastlstm.bench.runner import num_threads

State = tuple[Tensor, Tensor]


class FastMlpLstmPolicy(RecurrentActorCriticPolicy):
    """sb3-contrib's MlpLstmPolicy with FastLSTM in place of nn.LSTM.

    Takes the same arguments and has the same parameters; the same seed gives the same values, and a ``state_dict``
    travels both ways. Outputs and gradients are the same up to rounding. Only dropout between layers (in
    ``lstm_kwargs``) differs in what it drops: the loop draws anew for each step, in another order.

    Raises:
        ValueError: ``lstm_kwargs`` asks for ``batch_first``, ``bidirectional`` or ``proj_size``, for which the rollout
            buffer has states and sequences of other shapes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unusable = [name for name in ("batch_first", "bidirectional", "proj_size") if self.lstm_kwargs.get(name)]
        if unusable:
            raise ValueError(f"lstm_kwargs must leave the layout of a plain LSTM, got {', '.join(unusable)}")
        # Not the whole policy: what a feature extractor of the user's is made of is not ours to change.
        for lstm in (self.lstm_actor, self.lstm_critic):
            if lstm is not None:
                swap_lstm(lstm)

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: State, episode_starts: Tensor, lstm: FastLSTM
    ) -> tuple[Tensor, State]:
        """Run the LSTM over padded sequences; the interface is that of the method this overrides.

        Args:
            features: ``[S * T, I]``: the steps of the first sequence, then of the second, ...; T is 1 while a rollout
                is collected, and S then the number of environments.
            lstm_states: initial states ``(h_0, c_0)``, each ``[L, S, H]``.
            episode_starts: ``[S * T]``, 1 where an episode starts and both states are zero before the step, else 0.
            lstm: the actor's or the critic's.

        Returns:
            The outputs ``[S * T, H]`` in the order of ``features``, and the final states.
        """
        sequences = lstm_states[0].size(1)
        x = features.reshape(sequences, -1, lstm.input_size).transpose(0, 1)
        reset_mask = episode_starts.reshape(sequences, -1).transpose(0, 1) != 0
        y, states = lstm(x, lstm_states, reset_mask=reset_mask)
        return y.transpose(0, 1).flatten(0, 1), states


class FastCnnLstmPolicy(FastMlpLstmPolicy, CnnLstmPolicy):
    """sb3-contrib's CnnLstmPolicy, for images, with FastLSTM; as :class:`FastMlpLstmPolicy`."""


class FastMultiInputLstmPolicy(FastMlpLstmPolicy, MultiInputLstmPolicy):
    """sb3-contrib's MultiInputLstmPolicy, for Dict observations, with FastLSTM; as :class:`FastMlpLstmPolicy`."""


POLICIES: dict[str, type[RecurrentActorCriticPolicy]] = {"original": MlpLstmPolicy, "fastlstm": FastMlpLstmPolicy}

# CartPole is learnt with them, its velocities hidden or not.
ENVIRONMENTS = 8
HYPERPARAMETERS: dict[str, Any] = {
    "n_steps": 128,
    "batch_size": 256,
    "n_epochs": 10,
    "learning_rate": LinearSchedule(1e-3, 0, end_fraction=1),
    "clip_range": LinearSchedule(0.2, 0, end_fraction=1),
    "gamma": 0.98,
    "gae_lambda": 0.8,
    "stats_window_size": 20,
    "policy_kwargs": {"lstm_hidden_size": 64, "net_arch": [64]},
}


class TimedRecurrentPPO(RecurrentPPO):
    """RecurrentPPO that notes where its time goes.

    Attributes:
        rollout_s, update_s: seconds spent so far on collecting rollouts and on updating the policy.
        updates: how often it was updated, each time in several epochs over a rollout.
        curve: after each rollout by whose end an episode has ended: steps and seconds so far, and the mean return of
            the last episodes, ``stats_window_size`` of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rollout_s = self.update_s = 0.0
        self.updates = 0
        self.curve: list[tuple[int, float, float]] = []
        super().__init__(*args, **kwargs)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """One rollout, timed."""
        start = time.perf_counter()
        going_on: bool = super().collect_rollouts(*args, **kwargs)
        self.rollout_s += time.perf_counter() - start
        returns = [episode["r"] for episode in self.ep_info_buffer]
        if returns:
            self.curve.append((self.num_timesteps, self.rollout_s + self.update_s, statistics.fmean(returns)))
        return going_on

    def train(self) -> None:
        """One update, timed."""
        start = time.perf_counter()
        super().train()
        self.update_s += time.perf_counter() - start
        self.updates += 1


@dataclass(frozen=True)
class Result:
    """One training.

    Attributes:
        policy: a key of ``POLICIES``.
        seed: of parameters, actions and environments.
        steps: of all environments together.
        mean_return: of the last episodes, ``stats_window_size`` of them; None if none has ended.
        wall_s: seconds, of which ``rollout_s`` for rollouts and ``update_s`` for updates of the policy.
        updates: how often the policy was updated.
        update_mean_s: seconds per update.
        target_return, target_s: seconds until the mean return was that much at a rollout's end; None if it never was.
        curve: see :class:`TimedRecurrentPPO`.
    """

    policy: str
    seed: int
    steps: int
    mean_return: float | None
    wall_s: float
    rollout_s: float
    update_s: float
    updates: int
    update_mean_s: float
    target_return: float | None
    target_s: float | None
    curve: list[tuple[int, float, float]]


def make_environments(name: str, seed: int, observe: Sequence[int] | None = None) -> VecEnv:
    """``ENVIRONMENTS`` copies of an environment.

    Args:
        name: as registered with gymnasium.
        seed: of the first copy; the others count on from it.
        observe: which elements of the observation the agent sees; all of them if None. CartPole's are position,
            velocity, angle and angular velocity: without the velocities it takes a memory.

    Raises:
        ValueError: the observation is no vector with these elements.
    """

    def select(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
        if observe is None:
            return env
        space, elements = env.observation_space, list(observe)
        if not (isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1):
            raise ValueError(f"observe needs an environment whose observations are vectors, got {space}")
        if not all(0 <= element < space.shape[0] for element in elements):
            raise ValueError(f"observe must be of elements 0 to {space.shape[0] - 1}, got {elements}")
        seen = gymnasium.spaces.Box(space.low[elements], space.high[elements], dtype=space.dtype.type)
        return gymnasium.wrappers.TransformObservation(env, lambda observation: observation[elements], seen)

    return make_vec_env(name, ENVIRONMENTS, seed=seed, wrapper_class=select)


def train(
    policy: str, env: str, steps: int, *, seed: int, observe: Sequence[int] | None = None, target: float | None = None
) -> Result:
    """Train one policy, on the CPU.

    Args:
        policy: a key of ``POLICIES``.
        env: name of the environment.
        steps: of all environments together, rounded up to whole rollouts.
        seed: of parameters, actions and environments.
        observe: see :func:`make_environments`.
        target: the return for ``target_s``; the environment's reward threshold if None.
    """
    environments = make_environments(env, seed, observe)
    if target is None:
        target = gymnasium.spec(env).reward_threshold
    model = TimedRecurrentPPO(POLICIES[policy], environments, seed=seed, device="cpu", **HYPERPARAMETERS)
    start = time.perf_counter()
    model.learn(steps)
    wall_s = time.perf_counter() - start
    environments.close()
    reached = (seconds for _, seconds, mean in model.curve if target is not None and mean >= target)
    return Result(
        policy=policy,
        seed=seed,
        steps=model.num_timesteps,
        mean_return=model.curve[-1][-1] if model.curve else None,
        wall_s=wall_s,
        rollout_s=model.rollout_s,
        update_s=model.update_s,
        updates=model.updates,
        update_mean_s=model.update_s / model.updates,
        target_return=target,
        target_s=next(reached, None),
        curve=model.curve,
    )


def table(results: Sequence[Result]) -> str:
    """A row for each result, the means of each policy over its seeds, and the policies' ratio, as Markdown."""

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def ratio(slower: float | None, faster: float | None) -> str:
        return "-" if slower is None or faster is None else record.format_ratio(slower / faster)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if len(known) == len(values) else None

    target = results[0].target_return
    header = ["policy", "seed", "return", "wall s", "rollouts s", "updates s", "ms per update"]
    header.append("s to its target" if target is None else f"s to {target:g}")
    times = ("wall_s", "rollout_s", "update_s", "update_mean_s", "target_s")

    def row(policy: str, seed: str, mean_return: float | None, seconds: Sequence[float | None]) -> list[str]:
        wall, rollouts, updates, update, to_target = seconds
        in_ms = None if update is None else update * 1e3
        cells = [cell(mean_return, 1), cell(wall, 1), cell(rollouts, 1), cell(updates, 1), cell(in_ms, 0)]
        return [policy, seed, *cells, cell(to_target, 1)]

    rows = [row(r.policy, str(r.seed), r.mean_return, [getattr(r, name) for name in times]) for r in results]
    means = {}
    for policy in dict.fromkeys(result.policy for result in results):
        of_policy = [result for result in results if result.policy == policy]
        means[policy] = [mean([getattr(result, name) for result in of_policy]) for name in times]
        if len(of_policy) > 1:
            rows.append(row(policy, "mean", mean([result.mean_return for result in of_policy]), means[policy]))
    if len(means) == 2:
        rows.append(["ratio", "", "", *(ratio(*pair) for pair in zip(*means.values(), strict=True))])
    return record.markdown_table(header, rows, numeric=range(1, len(header)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The program; a mistake in the arguments ends it with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="name of the environment (default: %(default)s)")
    parser.add_argument("--observe", type=int, nargs="+", metavar="ELEMENT", help="hide the rest of the observation")
    parser.add_argument("--steps", type=int, default=100_000, help="of all environments (default: %(default)s)")
    parser.add_argument("--policy", choices=POLICIES, default="fastlstm")
    parser.add_argument("--compare", action="store_true", help="train with both policies, in turns")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="a training for each")
    parser.add_argument("--target", type=float, help="return to stop the time of (default: the environment's)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    for name in ("steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    try:
        for seed in options.seeds:
            make_environments(options.env, seed, options.observe).close()
        if options.json:
            record.ensure_writable(options.json)
    except (ValueError, gymnasium.error.Error) as error:
        parser.error(str(error))
    settings = {"observe": options.observe, "target": options.target}
    policies = list(POLICIES) if options.compare else [options.policy]
    with num_threads(options.threads):
        results = [
            train(policy, options.env, options.steps, seed=seed, **settings)
            for seed in options.seeds
            for policy in policies
        ]
        flags = record.flags()
    print(table(results))
    if options.json:
        libraries = (gymnasium, stable_baselines3, sb3_contrib)
        hyperparameters = {k: repr(v) if isinstance(v, LinearSchedule) else v for k, v in HYPERPARAMETERS.items()}
        record.write(
            options.json,
            {
                "machine": record.machine(),
                "versions": record.versions() | {library.__name__: library.__version__ for library in libraries},
                "flags": flags,
                "settings": {"env": options.env, **settings},
                "hyperparameters": {"environments": ENVIRONMENTS, **hyperparameters},
                "results": [asdict(result) for result in results],
            },
        )


if __name__ == "__main__":
    main()
