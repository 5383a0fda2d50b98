"""Each failing of another optimizer that its users reported, with the test here that passes.

The failings are those of K-FAC, Shampoo, SOAP, PSGD, Prodigy, D-Adaptation, Mechanic and of
libraries for meta-optimization, from their issues.
"""

from __future__ import annotations

import ast
import copy
import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import apo_core as apo
from verification.engine.scenes import scene, values

HERE = Path(__file__).parent.parent

PASSED = {
    "parameter groups with different rates are refused": (
        "engine/test_grouped.py::test_every_group_learns_its_own_best_rate"
    ),
    "a learning rate becomes negative or NaN": (
        "engine/test_safety.py::test_a_non_finite_gradient_changes_nothing_and_the_run_goes_on"
    ),
    "an estimate runs away": (
        "engine/test_trust_region.py::test_the_loss_never_rises_by_more_than_twice_what_is_allowed"
    ),
    "memory grows with kept graphs": (
        "engine/test_what_peers_lack.py::test_a_thousand_steps_keep_no_tensor_more"
    ),
    "a lookahead changes BatchNorm's statistics": (
        "engine/test_purity.py::test_a_meta_step_leaves_no_trace"
    ),
    "a checkpoint does not load": ("engine/test_checkpoint.py::test_a_loaded_run_is_the_saved_one"),
    "loading takes keys out of the caller's dictionary": (
        "engine/test_checkpoint.py::test_loading_does_not_share_or_change_the_dictionary"
    ),
    "a parameter without gradient is a crash": (
        "engine/test_conventions.py::test_a_parameter_without_gradient_stays_and_the_others_go_on"
    ),
    "grouped convolutions crash, dilated ones are wrong": (
        "engine/test_policy.py::test_every_structure_conforms_on_every_layer"
    ),
    "... in K-FAC": "engine/test_kfac_factors.py::"
    "test_factors_of_one_layer_are_sums_over_its_jacobian",
    "hooks do not fire under torch.compile": (
        "engine/test_compile.py::test_K_FAC_observes_a_compiled_model"
    ),
    "torch.compile is an error, or recompiles for ever": (
        "engine/test_compile.py::"
        "test_a_compiled_run_is_the_run_and_compiles_no_more_after_two_meta_steps"
    ),
    "attention's output projection is not preconditioned": (
        "engine/test_policy.py::test_queries_keys_and_values_do_not_mix"
    ),
    "embeddings, normalizations and bare parameters stay where they were": (
        "engine/test_policy.py::test_a_small_transformer_trains_with_every_structure"
    ),
    "16-bit parameters are NaN or an error": (
        "engine/test_precision.py::test_sixteen_bit_parameters_have_a_32_bit_phi_and_learn"
    ),
    "64-bit parameters are an error": (
        "engine/test_algorithm.py::test_the_step_follows_the_meta_step_and_is_scaled"
    ),
    "ill-conditioned factors stop training": (
        "engine/test_what_peers_lack.py::test_ill_conditioned_factors_are_diagonalized"
    ),
    "a deep copy shares or breaks": (
        "engine/test_conventions.py::test_a_deep_copy_goes_on_by_itself"
    ),
    "an infinite mini-batch under GradScaler": (
        "engine/test_schedules.py::test_a_grad_scaler_skips_one_infinite_mini_batch"
    ),
    "accumulated gradients are not those of the whole batch": (
        "engine/test_precision.py::test_gradients_may_be_accumulated_over_parts_of_a_batch"
    ),
    "a cold start diverges on a convex quadratic": (
        "engine/test_what_peers_lack.py::test_no_cold_start_diverges_on_a_convex_quadratic"
    ),
}


@pytest.mark.parametrize("failing", PASSED)
def test_every_failing_has_a_test_here(failing: str) -> None:
    file, name = PASSED[failing].split("::")
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def live() -> tuple[int, int]:
    """How many tensors there are, and their bytes."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    return len(tensors), sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("rule", ["nesterov", "any optimizer", "ekfac"])
def test_a_thousand_steps_keep_no_tensor_more(rule: str) -> None:
    """With a meta-step at every fifth of them, and a look at the diagnostics."""
    s = scene(rule, interval=5)
    s.run(10)
    s.optimizer.diagnostics.clear()
    before = live()
    s.run(1000)
    s.optimizer.diagnostics.clear()
    assert s.optimizer.skipped_steps == s.optimizer.skipped_meta_steps == 0
    assert live() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ill_conditioned_factors_are_diagonalized(dtype: torch.dtype) -> None:
    """Inputs from 1e-12 to 1e12, equal inputs, dead inputs: K-FAC steps on, damped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    rule = apo.rules.KFAC(model, lr=1e-3, damping=1e-3, interval=1)
    x = torch.randn(16, 8, dtype=dtype)
    x[:, 0] *= 1e12
    x[:, 1] *= 1e-12
    x[:, 3] = x[:, 2]
    x[:, 4] = 0.0
    for _ in range(5):
        with rule.observe(model):
            nn.functional.cross_entropy(model(x), torch.arange(16) % 3).backward()
        grads = [p.grad for p in model.parameters()]
        updates, _ = rule(list(model.parameters()), [g for g in grads if g is not None], {})
        assert all(bool(u.isfinite().all()) for u in updates)


@pytest.mark.parametrize("rule", ["sgd", "heavy ball", "rmsprop", "adamw", "diagonal", "ekfac"])
def test_no_cold_start_diverges_on_a_convex_quadratic(rule: str) -> None:
    """24 parameters, their curvatures from 0.01 to 100, and default settings; the loss falls."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    x = torch.randn(32, 6, dtype=torch.float64) * torch.logspace(-1, 1, 6, dtype=torch.float64)
    build = {
        "sgd": lambda: apo.rules.SGD(model),
        "heavy ball": lambda: apo.rules.SGD(model, momentum=0.9),
        "rmsprop": lambda: apo.rules.RMSprop(model),
        "adamw": lambda: apo.rules.Adam(model),
        "diagonal": lambda: apo.rules.Preconditioned(model, apo.Diagonal),
        "ekfac": lambda: apo.rules.Preconditioned(model),
    }[rule]()
    optimizer = apo.APO(
        model,
        build,
        apo.ProximalObjective("squared_error", 0.1, 0.0, trust_factor=2.0),
        torch.optim.Adam(build.parameters(), lr=0.1),
        interval=5,
    )

    def loss() -> torch.Tensor:
        return 0.5 * model(x).square().sum(1).mean()

    start = float(loss().detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss().backward()
        if optimizer.meta_due:
            optimizer.meta_step(loss=loss, outputs=lambda: model(x))
        optimizer.step()
    assert float(loss().detach()) < 0.5 * start


def test_the_callers_arguments_are_left_alone() -> None:
    """The model's and φ's values, and the meta-optimizer's settings, are as they were given."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    rule = apo.rules.Preconditioned(model)
    meta_optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)
    before, settings = [*values(model), *values(rule)], copy.deepcopy(meta_optimizer.state_dict())
    apo.APO(model, rule, apo.ProximalObjective("kl", 0.1), meta_optimizer)
    assert all(map(torch.equal, before, [*values(model), *values(rule)]))
    assert meta_optimizer.state_dict() == settings
