"""Population based training, by Ray Tune: networks that clone the best of them, rates perturbed.

After every epoch the member with the highest training loss takes over the weights, the optimizer's
state and the learning rate of the one with the lowest; that rate times 0.8 or 1.2 is then its own.
Nothing is drawn anew from the rates' first distribution. The members train one after another, as on
one device, and see the same mini-batches in the same order.

Ray draws its factors from Python's global generator, with which it also shuffles what its processes
send: equal seeds could differ. So the factors are drawn here, by the seed. What Ray writes lies in
a temporary folder, and its processes end with this one; a run that was killed begins anew. Where it
leaves no member waiting at an epoch's end it starts a new process for the next, some seconds each,
which "coordination_seconds" has and the training's seconds have not.

Source: P18 appendix H; Jaderberg et al. 2017.
"""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, final

import torch
from torch import nn

from experiments.problems import Batch, Stream, Supervised, Wrapped
from experiments.recipes import Recipe
from experiments.records import Outcome
from experiments.training import METERED_STEPS, Progress, train

# Ray reads these when it is imported or started; what is set already stays.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anyone
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # otherwise it keeps one in the home folder
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its processes see the devices that this one sees
    "RAY_AIR_NEW_OUTPUT": "0",  # the runner shows the progress
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the runner's
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
try:
    ray: Any = import_module("ray")
    tune: Any = import_module("ray.tune")
    schedulers: Any = import_module("ray.tune.schedulers")
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "`ray` must be installed for population based training, got no such package; install the "
        "extra `sweep`: pip install -e '.[sweep]'."
    ) from error

FACTORS = (0.8, 1.2)
SEEDS_APART = 10_000
"""From a member's seed to the next one's: the first starts where other runs of the seed do."""
KEPT = 4  # checkpoints of a member; Ray warns below 3
STATE = "state.pt"


@final
@dataclass(frozen=True)
class Population:
    """What is trained.

    Attributes:
        network: Called with `seed`, gives a member's network.
        problem: Gives the problem, the same with every call.
        recipe: The members' optimizer; its `lr` is replaced by the member's.
        rates: The first learning rate of every member.
        epochs: How many each member trains.
        seed: Of the members' weights and of the factors.
        threads: Of a member.
    """

    network: Callable[..., nn.Module]
    problem: Callable[[], Supervised]
    recipe: Recipe
    rates: Sequence[float]
    epochs: int
    seed: int
    threads: int = 1


def train_population(population: Population, progress: Progress) -> Outcome:
    """Train the population, its members one after another on one device.

    Args:
        population: at least two members.
        progress: called with (done, total, text) after every epoch of a member.

    Returns:
        curves: a point for every epoch, and one before the first. "step" of each member; "loss",
            "test" and "learning_rate" of the member whose training loss was the lowest there;
            "seconds" and "passes" of all members together, those of `training.train`.
        metrics: "loss" and "test" at the end, "steps" of a member, and of all members "passes",
            the seconds of training, meta-steps (none) and evaluation, and "peak_bytes": the most
            that one had, times their number. "coordination_seconds" is the rest of the wall time:
            Ray's processes, checkpoints.

    Raises:
        ValueError: there is only one member.
    """
    if len(population.rates) < 2:
        raise ValueError(
            f"`rates` must hold those of at least two members, got {list(population.rates)}; a "
            "single network is trained by `training.train`."
        )
    began = perf_counter()
    results: list[dict[str, Any]] = []
    total = population.epochs * len(population.rates)

    class Follow(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **rest: Any
        ) -> None:
            results.append(result)
            progress(len(results), total, f"loss {result['loss']:.3g}")

    with _session() as folder:
        failed = _fit(population, folder, Follow()).errors
    if failed:
        raise failed[0]
    return _outcome(results, perf_counter() - began)


def _fit(population: Population, folder: Path, follow: Any) -> Any:
    """Ray's results, once every member has trained for all epochs."""
    source = random.Random(population.seed)

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        member = config["member"]
        return {"member": member | {"lr": member["lr"] * source.choice(FACTORS)}}

    members = [
        {"seed": population.seed + SEEDS_APART * index, "lr": rate}
        for index, rate in enumerate(population.rates)
    ]
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(Member, population=population), {"cpu": 1}),
        param_space={"member": tune.grid_search(members)},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            reuse_actors=True,  # a process for all of them
            scheduler=schedulers.PopulationBasedTraining(
                time_attr="training_iteration",
                perturbation_interval=1,
                quantile_fraction=1 / len(members),  # one member takes over from one
                custom_explore_fn=explore,
                synch=True,
                log_config=False,
            ),
        ),
        run_config=tune.RunConfig(
            storage_path=str(folder / "results"),
            stop={"training_iteration": population.epochs},
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT),
            failure_config=tune.FailureConfig(fail_fast=True),
            callbacks=[follow],
            verbose=0,
        ),
    )
    return tuner.fit()


@contextmanager
def _session() -> Iterator[Path]:
    """A Ray of our own with one core, which leaves neither processes nor files."""
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            num_cpus=1,
            num_gpus=0,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            yield Path(folder)
        finally:
            ray.shutdown()


@final
class Member(tune.Trainable):
    """One network of the population, as Ray drives it: its step is an epoch.

    The members are in one process after another; a checkpoint holds what they do not share.
    """

    def setup(self, config: dict[str, Any], population: Population) -> None:
        """Begin the first member of this process."""
        torch.set_num_threads(population.threads)
        self.population = population
        self.problem = Repeated(population.problem())
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another member in this process; its checkpoint, if it has one, is loaded next."""
        member = new_config["member"]
        self.model = self.population.network(seed=member["seed"])
        recipe: Any = self.population.recipe
        self.optimizer = replace(recipe, lr=member["lr"]).build(self.model, self.problem)
        return True

    def step(self) -> dict[str, Any]:
        """Train for an epoch: `training.train`'s metrics, and the values before it."""
        steps = self.problem.begin(self.iteration)
        outcome = train(
            self.model,
            self.optimizer,
            self.problem,
            steps=steps,
            record_every=steps,
            metered_steps=0 if self.iteration else METERED_STEPS,
        )
        before = {name: outcome.curves[name][0] for name in ("loss", "test")}
        rate = self.optimizer.param_groups[0]["lr"]
        return {**outcome.metrics, "epoch_steps": steps, "before": before, "learning_rate": rate}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Weights and the optimizer's state."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, Path(checkpoint_dir) / STATE)

    def load_checkpoint(self, checkpoint: str) -> None:
        """The same, of this member or of the one that it takes over; the rate stays its own."""
        rate = self.optimizer.param_groups[0]["lr"]
        state = torch.load(Path(checkpoint) / STATE, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = rate


@final
class Repeated(Wrapped):
    """A problem whose mini-batches of an epoch come again for every member.

    Args:
        problem: gives them once.
    """

    def __init__(self, problem: Supervised) -> None:
        super().__init__(problem)
        self._steps = problem.steps_per_epoch
        self._drawn = 0  # epochs
        self._epoch: list[Batch] = []
        self._left: Iterator[Batch] = iter(())

    def begin(self, epoch: int) -> int:
        """Start that epoch, counted from 0, with its first mini-batch; the number of mini-batches.

        Raises:
            ValueError: a later epoch was begun before.
        """
        if epoch < self._drawn - 1:
            raise ValueError(
                f"`epoch` must be at least {self._drawn - 1}, the last that was begun, got {epoch};"
                " build the problem anew to go back."
            )
        while self._drawn <= epoch:
            self._epoch = [self.problem.batch("loss") for _ in range(self._steps)]
            self._drawn += 1
        self._left = iter(self._epoch)
        return len(self._epoch)

    def batch(self, stream: Stream) -> Batch:
        """The next mini-batch of the epoch, whatever the stream."""
        return next(self._left)


def _outcome(results: Sequence[dict[str, Any]], wall_seconds: float) -> Outcome:
    """The population's curves and metrics from what its members told after every epoch."""
    epochs = [
        [one for one in results if one["training_iteration"] == epoch]
        for epoch in sorted({one["training_iteration"] for one in results})
    ]
    first = min(epochs[0], key=lambda one: one["before"]["loss"])
    rows = [{"step": 0.0, "seconds": 0.0, "passes": 0.0, **first["before"]}]
    rows[0]["learning_rate"] = first["learning_rate"]
    for members in epochs:
        best = min(members, key=lambda one: one["loss"])
        row = {name: best[name] for name in ("loss", "test", "learning_rate")}
        row["step"] = rows[-1]["step"] + best["epoch_steps"]
        row["seconds"] = rows[-1]["seconds"] + sum(one["training_seconds"] for one in members)
        row["passes"] = rows[-1]["passes"] + sum(one["passes"] for one in members)
        rows.append(row)
    end = rows[-1]
    evaluation = sum(one["evaluation_seconds"] for one in results)
    metrics = {
        "loss": end["loss"],
        "test": end["test"],
        "steps": end["step"],
        "passes": end["passes"],
        "training_seconds": end["seconds"],
        "meta_seconds": 0.0,
        "evaluation_seconds": evaluation,
        "coordination_seconds": wall_seconds - end["seconds"] - evaluation,
        "peak_bytes": len(epochs[0]) * max(one["peak_bytes"] for one in results),
    }
    return Outcome(metrics, {name: [row[name] for row in rows] for name in rows[0]})
