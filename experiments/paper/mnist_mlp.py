"""What the experiments on MNIST share: the images, the MLP 784-1000-1000-10, one run.

P18 and P22 do not say how the images are scaled: here all pixels are shifted and scaled by the mean
and the deviation of the training images. Weights are drawn as `nn.Linear` draws them.

Source: P18 section 5.2.1, P22 section 6.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from experiments.data import Dataset
from experiments.data.dataset import first
from experiments.images import standardized_images
from experiments.models import mlp
from experiments.problems import Supervised
from experiments.records import Outcome, Trial
from experiments.registry import Context
from experiments.training import train_epochs

WIDTHS = (784, 1000, 1000, 10)
BATCH_SIZE = 100
TEST_SHARE = 6  # MNIST has a sixth as many test images


def task(examples: int, epochs: int, points: int) -> dict[str, Any]:
    """What the trials of a preset share: the first training examples, epochs, points of a curve."""
    return {"examples": examples, "epochs": epochs, "points": points}


def steps_per_epoch(options: dict[str, Any]) -> int:
    """Mini-batches to an epoch of the task."""
    return -(-options["examples"] // BATCH_SIZE)


def run_mlp(trial: Trial, context: Context) -> Outcome:
    """Train the MLP on MNIST: "loss" is the training loss, "test" the test error."""
    problem = image_problem(context.load("mnist"), trial, flat=True, device=context.device)
    model = mlp(WIDTHS, seed=trial.seed, device=context.device)
    return run_epochs(model, problem, trial, context)


def image_problem(dataset: Dataset, trial: Trial, *, flat: bool, device: str) -> Supervised:
    """Mini-batches of the first images, (batch, 784) if `flat`, else (batch, 1, 28, 28)."""
    train_part = first(dataset.train, trial.options["examples"])
    test_part = first(dataset.test, -(-trial.options["examples"] // TEST_SHARE))
    parts = standardized_images(train_part, test_part)
    if flat:
        parts = [(images.flatten(1), labels) for images, labels in parts]
    train_images, test_images = parts
    return Supervised(
        train_images,
        test_images,
        "cross_entropy",
        batch_size=BATCH_SIZE,
        seed=trial.seed,
        curvature_size=BATCH_SIZE,
        device=device,
    )


def run_epochs(model: nn.Module, problem: Supervised, trial: Trial, context: Context) -> Outcome:
    """Train with the trial's recipe for its epochs."""
    epoch, points = problem.steps_per_epoch, trial.options["points"]
    return train_epochs(trial, context, model, problem, steps_per_epoch=epoch, points=points)


def spread(losses: Sequence[float]) -> str:
    """ "between 0.01 and 0.02, max/min = 2"; a loss can fall to 0 in float32."""
    low, high = min(losses), max(losses)
    ratio = f"{high / low:.3g}" if low > 0 else "∞"
    return f"between {low:.2g} and {high:.2g}, max/min = {ratio}"
