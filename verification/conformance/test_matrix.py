"""Every rule under every objective on every kind of network, inside Algorithm 1, in float64."""

from itertools import product

import pytest

import apo_core as apo
from apo_core.testing import Build, check_update_rule
from verification.conformance.models import NETWORKS, network, task
from verification.engine.scenes import RULES as SCENES

MATRIX: dict[str, Build] = {
    **SCENES,
    "kfac": lambda model: apo.rules.KFAC(model, lr=0.05, damping=0.1, smoothing=0.5),
}


DISCREPANCIES: dict[str, str | apo.Discrepancy] = {
    "kl": "kl",
    "squared error": "squared_error",
    "bregman": apo.Bregman("cross_entropy"),
}
VARIANTS = list(product(("exact", "linear", "quadratic"), ("exact", "quadratic"), DISCREPANCIES))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", MATRIX)
@pytest.mark.parametrize(("loss", "fsd", "discrepancy"), VARIANTS)
def test_a_meta_step_is_right_and_leaves_no_trace(
    name: str, rule: str, loss: str, fsd: str, discrepancy: str
) -> None:
    objective = apo.ProximalObjective(
        DISCREPANCIES[discrepancy],
        0.3,
        0.1,
        loss,  # pyright: ignore[reportArgumentType]
        fsd,  # pyright: ignore[reportArgumentType]
    )
    kind = NETWORKS[name]
    # What a meta-step leaves alone does not depend on the divergence's formula.
    checks = ["gradient of Q", *(["meta-step"] if discrepancy == "kl" else [])]
    check_update_rule(MATRIX[rule], network(kind), task(kind, objective), checks=checks)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", MATRIX)
def test_training_can_be_interrupted_and_survives_bad_gradients(name: str, rule: str) -> None:
    checks = ["state", "step", "resume", "missing gradient", "non-finite gradient"]
    kind, objective = NETWORKS[name], apo.ProximalObjective("kl", 0.3, 0.1)
    check_update_rule(MATRIX[rule], network(kind), task(kind, objective), checks=checks)
