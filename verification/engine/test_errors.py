"""Bad input gets one sentence: what was named, what was required, what came, what to do."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apo_core as apo
from verification.engine.scenes import scene

LINEAR = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: apo.ProximalObjective("kl", fsd_weight=-1.0),
            ValueError,
            r"`fsd_weight` must be non-negative and finite, got -1.0; 0 leaves the term out",
        ),
        (
            lambda: apo.ProximalObjective("kl", wsd_weight=math.nan),
            ValueError,
            "`wsd_weight` must be non-negative and finite, got nan",
        ),
        (
            lambda: apo.ProximalObjective("hellinger"),
            ValueError,
            r"`discrepancy` must be one of \['bernoulli_kl', .*, got 'hellinger'",
        ),
        (
            lambda: apo.ProximalObjective(3.0),  # pyright: ignore[reportArgumentType]
            TypeError,
            "`discrepancy` must be one of .* or a callable .*, got float",
        ),
        (
            lambda: apo.ProximalObjective(loss="cubic"),  # pyright: ignore[reportArgumentType]
            ValueError,
            r"`loss` must be one of \['exact', 'linear', 'quadratic'\], got 'cubic'",
        ),
        (
            lambda: apo.ProximalObjective(fsd="linear"),  # pyright: ignore[reportArgumentType]
            ValueError,
            r"`fsd` must be one of \['exact', 'quadratic'\], got 'linear'",
        ),
        (
            lambda: apo.CategoricalKL("both"),  # pyright: ignore[reportArgumentType]
            ValueError,
            "`order` must be 'lookahead_current' .*, got 'both'",
        ),
        (
            lambda: apo.Bregman("hinge"),  # pyright: ignore[reportArgumentType]
            ValueError,
            r"`potential` must be one of \['binary_cross_entropy', 'cross_entropy', 'poisson', "
            r"'squared_error'\] or a callable, got 'hinge'",
        ),
        (
            lambda: apo.BernoulliKL("both"),  # pyright: ignore[reportArgumentType]
            ValueError,
            "`order` must be 'lookahead_current' .*, got 'both'",
        ),
        (
            lambda: apo.GaussianKL("both"),  # pyright: ignore[reportArgumentType]
            ValueError,
            "`order` must be 'lookahead_current' .*, got 'both'",
        ),
        (
            lambda: apo.GaussianKL()(torch.ones(2, 3), torch.ones(2, 3)),
            ValueError,
            r"`outputs` must hold means, then as many log sigmas, .* got shape \(2, 3\); give the",
        ),
        (
            lambda: apo.ProximalObjective({}, 0.1),
            ValueError,
            "`discrepancy` must name at least one output, got an empty mapping; set fsd_weight=0",
        ),
        (
            lambda: apo.ProximalObjective({"logits": "hellinger"}, 0.1),
            ValueError,
            "`discrepancy` must be one of .*, got 'hellinger'",
        ),
        (
            lambda: apo.rules.SGD(LINEAR, lr=0.0),
            ValueError,
            "`lr` must be positive and finite, got 0.0; φ is its logarithm",
        ),
        (
            lambda: apo.rules.SGD(LINEAR, momentum=1.0),
            ValueError,
            r"`momentum` must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda: apo.rules.SGD(LINEAR, nesterov=True),
            ValueError,
            "`nesterov` must come with `momentum` > 0",
        ),
        (
            lambda: apo.rules.SGD([torch.ones(2)]),  # pyright: ignore[reportArgumentType]
            TypeError,
            "`model` must be a torch.nn.Module, got list; wrap loose tensors",
        ),
        (
            lambda: apo.rules.SGD(copy.deepcopy(LINEAR).requires_grad_(False)),
            ValueError,
            "`model` must have at least one parameter with requires_grad, got none",
        ),
        (
            lambda: apo.rules.Preconditioned(LINEAR, initial_scale=-0.5),
            ValueError,
            "`initial_scale` must be positive and finite .*, got -0.5; the square root",
        ),
        (
            lambda: apo.rules.Preconditioned(LINEAR, nn.Linear),  # pyright: ignore[reportArgumentType]
            TypeError,
            r"`structure` must be a class of preconditioners \(EKFAC, Diagonal or Dense\), got",
        ),
        (
            lambda: apo.EKFAC(torch.ones(3)),
            ValueError,
            r"`parameter` must be a weight \(out, in, ...\), got shape \(3,\); use Diagonal",
        ),
    ],
)
def test_bad_settings(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def build(**changes: Any) -> apo.APO:
    model = changes.pop("model", nn.Linear(2, 2))
    rule = changes.pop("rule", None) or apo.rules.SGD(model)
    arguments: dict[str, Any] = {
        "objective": apo.ProximalObjective("kl", 0.1),
        "meta_optimizer": torch.optim.SGD(list(rule.parameters()) or [torch.ones(1)], lr=0.1),
    }
    return apo.APO(model, rule, **(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"interval": 0}, ValueError, "`interval` must be an integer of at least 1, got 0"),
        ({"interval": 2.5}, ValueError, "`interval` must be an integer of at least 1, got 2.5"),
        ({"update_scale": 2.0}, ValueError, r"`update_scale` must lie in \(0, 2\), got 2.0"),
        ({"rule": nn.Linear(1, 1)}, TypeError, "`rule` must be a UpdateRule, got Linear"),
        ({"objective": "kl"}, TypeError, "`objective` must be a ProximalObjective, got str"),
        ({"meta_optimizer": None}, TypeError, "`meta_optimizer` must be a Optimizer, got NoneType"),
        (
            {"meta_optimizer": torch.optim.SGD(LINEAR.parameters(), lr=0.1)},
            ValueError,
            "`meta_optimizer` must hold every φ of the rule, got 0 of 1; build it as",
        ),
        (
            {"rule": apo.rules.SGD(LINEAR).requires_grad_(False)},
            ValueError,
            "`rule` must have a parameter φ with requires_grad, got none",
        ),
        (
            {"warmup": apo.Warmup(torch.optim.SGD(LINEAR.parameters(), lr=0.1), -1)},
            ValueError,
            "`warmup.steps` must be at least 0, got -1",
        ),
    ],
)
def test_bad_arguments_of_APO(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(**changes)


def test_another_parameter_group_is_refused() -> None:
    optimizer = build()
    with pytest.raises(RuntimeError, match="`param_groups` of APO must stay as they were built"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_no_gradient_at_all() -> None:
    s = scene()
    with pytest.raises(RuntimeError, match="a parameter must have a gradient, got none"):
        s.optimizer.step()
    with pytest.raises(RuntimeError, match="call backward"):
        s.meta_step()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda s: s.model(s.x), r"`loss` must return a scalar tensor, got \(6, 3\); reduce"),
        (lambda s: 1.0, "`loss` must return a scalar tensor, got float"),
        (lambda s: s.loss().detach(), "`loss` must return a tensor that depends on the parameters"),
    ],
)
def test_bad_losses(loss: Callable[[Any], Any], message: str) -> None:
    s = scene()
    s.backward()
    with pytest.raises(ValueError, match=message):
        s.optimizer.meta_step(loss=lambda: loss(s), outputs=s.outputs)


def test_bad_outputs() -> None:
    s = scene()
    s.backward()
    with pytest.raises(ValueError, match=r"`outputs` must be a closure .*, got None"):
        s.optimizer.meta_step(loss=s.loss)
    with pytest.raises(TypeError, match=r"`outputs` must return a tensor .*, got float"):
        s.optimizer.meta_step(loss=s.loss, outputs=lambda: 1.0)  # pyright: ignore[reportArgumentType]
    sizes = iter((4, 6))
    message = r"`outputs` must return one shape, got \(4, 3\) at θ and \(6, 3\) at θ'; draw"
    with pytest.raises(ValueError, match=message):
        s.optimizer.meta_step(loss=s.loss, outputs=lambda: s.model(s.x_other[: next(sizes)]))


def test_a_bad_discrepancy() -> None:
    s = scene(objective=apo.ProximalObjective(lambda z, current: z - current, 0.1))
    s.backward()
    with pytest.raises(ValueError, match=r"`discrepancy` must return a scalar tensor, got \(6"):
        s.meta_step()


class Frozen(apo.UpdateRule):
    """−η g with η taken out of the graph."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.log_lr = nn.Parameter(torch.tensor(0.0))

    def init_state(self, params: list[Tensor]) -> dict[str, list[Tensor]]:
        return {}

    def forward(
        self, params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        if self.how == "wrong shapes":
            return [-self.log_lr.exp() * g.sum() for g in grads], state
        lr = math.exp(self.log_lr.item()) if self.how == "item" else self.log_lr.detach().exp()
        return [-lr * g for g in grads], state


@pytest.mark.parametrize("how", ["item", "detach"])
def test_a_rule_that_is_not_differentiable(how: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = build(model=model, rule=Frozen(how))
    x = torch.ones(3, 2)
    model(x).square().mean().backward()
    message = "the update of Frozen must be differentiable in φ, got one that does not depend on `l"
    with pytest.raises(RuntimeError, match=message):
        optimizer.meta_step(loss=lambda: model(x).square().mean(), outputs=lambda: model(x))


def test_a_rule_of_another_model() -> None:
    model = nn.Linear(2, 2)
    optimizer = build(model=model, rule=Frozen("wrong shapes"))
    model(torch.ones(3, 2)).mean().backward()
    message = r"`rule` must return one update of the shape of each parameter, \[\(2, 2\), \(2,\)\]"
    with pytest.raises(ValueError, match=message):
        optimizer.meta_step(loss=lambda: model(torch.ones(3, 2)).mean())
