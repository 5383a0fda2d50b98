"""Sharpness: the Hessian's greatest eigenvalue by brute force, and what is said of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional as F

from experiments.models import mlp
from experiments.problems import Supervised
from experiments.records import Outcome, Record
from experiments.seeds import generator
from experiments.sharpness import LANCZOS, METHODS, Sharpness, judged_by_sharpness, late
from verification.experiments.fakes import record_by
from verification.tolerances import FUNCTION, assert_close

WIDTHS = (3, 5, 4)


def _problem() -> Supervised:
    source = generator(3, "task")
    inputs = torch.randn(20, WIDTHS[0], generator=source, dtype=torch.float64)
    data = (inputs, torch.randint(0, WIDTHS[-1], (20,), generator=source))
    return Supervised(data, data, "cross_entropy", batch_size=4, seed=0)


def test_sharpness_is_the_greatest_eigenvalue_of_the_dense_hessian() -> None:
    problem, model = _problem(), mlp(WIDTHS, seed=2, dtype=torch.float64)
    values = judged_by_sharpness(problem).evaluate(model)

    inputs, labels = problem.train
    shapes = {name: p.shape for name, p in model.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        params = {
            name: part.reshape(shape)
            for part, (name, shape) in zip(parts, shapes.items(), strict=True)
        }
        return F.cross_entropy(functional_call(model, params, (inputs,)), labels)

    H, g = hessian(loss, theta), jacobian(loss, theta)
    assert isinstance(H, torch.Tensor)
    assert isinstance(g, torch.Tensor)
    H, g = H.numpy(), g.numpy()
    greatest = np.linalg.eigvalsh(H)[-1]
    # Lanczos stops when its residual is below the relative tolerance; the eigenvalue of a symmetric
    # matrix is then as near
    assert abs(values["sharpness"] - greatest) <= LANCZOS["tol"] * greatest
    size = len(theta) * len(inputs)
    condition = float(np.linalg.norm(H, 2) * (g @ g) / abs(g @ H @ g))
    assert_close(values["along"], g @ H @ g / (g @ g), FUNCTION, size=size, condition=condition)


def _records(sharpness: dict[str, float]) -> list[Record]:
    experiment = Sharpness()
    records = []
    for trial in experiment.plan("default", None, []):
        for name, one in METHODS.items():
            if all(trial.options.get(key) == value for key, value in one.options().items()):
                greatest = sharpness[name] * 1.1**trial.seed
                curves = {
                    "step": [0.0, 1.0, 2.0, 3.0, 4.0],
                    "loss": [1.0] * 5,
                    "sharpness": [9.0, 9.0, 9.0, greatest, greatest],
                    "step_ratio": [math.nan, 0.5, 0.5, 0.5, 0.5],
                }
                outcome = Outcome({"loss": 1.0}, curves)
                records.append(record_by("sharpness", trial, outcome))
    return records


def test_late_is_the_geometric_mean_of_the_second_half() -> None:
    run = _records(dict.fromkeys(METHODS, 4.0))[0]
    assert late(run, "sharpness") == 4.0
    assert late(run, "product") == 2.0
    curves = {**run.outcome.curves, "sharpness": [9.0, 9.0, 9.0, -1.0, 4.0]}
    assert late(replace(run, outcome=Outcome({"loss": 1.0}, curves)), "sharpness") == 4.0
    diverged = replace(run, outcome=Outcome({"loss": math.inf}, curves))
    assert late(diverged, "sharpness") == math.inf


def test_the_verdict_is_beside_apo() -> None:
    sharpness = {name: 4.0 if name == "APO" else 2.0 for name in METHODS}
    verdict = Sharpness().verdict(_records(sharpness))
    assert "fixed η = 1: η λmax = 1" in verdict
    assert "λmax 0.5 [0.5, 0.5] times APO's" in verdict
