"""Outputs of every form: tensors, tuples, lists, mappings, and padding that does not count."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apo_core as apo
from reference.discrepancies import Discrepancy
from verification import bridge
from verification.l0_oracle.rounding import divergence_size
from verification.profiles import share
from verification.strategies import ALL_DISCREPANCIES
from verification.strategies.outputs import output_shape, outputs
from verification.tolerances import FUNCTION, assert_close

FSDS = ("exact", "quadratic")
Result = tuple[float, np.ndarray]

seeds = st.integers(0, 2**16)
same_outputs = pytest.mark.loose(
    "Both sides have the same outputs, nearly to the bit; only the last sums are in another order."
)


class TwoHeads(nn.Module):
    """Logits of 3 classes and 2 predictions at every token, (batch, tokens, ·); float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5, dtype=torch.float64)
        self.logits = nn.Linear(5, 3, dtype=torch.float64)
        self.values = nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and values."""
        hidden = self.body(x).tanh()
        return self.logits(hidden), self.values(hidden)


class ModelOutput(OrderedDict[str, Any]):
    """As Hugging Face's: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


Pair = namedtuple("Pair", ["logits", "values"])


def result(
    seed: int,
    returned: Callable[[Tensor, Tensor], Any],
    discrepancy: Any,
    fsd: Any,
    x: Tensor | None = None,
) -> Result:
    """The FSD and dQ/dφ (of log η per layer) where the closure returns `returned(logits, values)`.

    The loss is a sum of squares of θ, so that the FSD is all that depends on the outputs.
    """
    torch.manual_seed(seed)
    model = TwoHeads()
    x = torch.randn(3, 4, 4, dtype=torch.float64) if x is None else x
    rule = apo.rules.SGD(model, lr=0.1, per_layer=True)
    objective = apo.ProximalObjective(discrepancy, 1.0, 0.0, "linear", fsd)
    optimizer = apo.APO(model, rule, objective, torch.optim.SGD(rule.parameters(), lr=0.1))

    def loss() -> Tensor:
        return torch.stack([p.square().sum() for p in model.parameters()]).sum()

    loss().backward()
    terms = optimizer.meta_backward(loss=loss, outputs=lambda: returned(*model(x)))
    (log_lr,) = rule.parameters()
    return float(terms.fsd), bridge.phi_gradient(log_lr)


def assert_same(actual: Result, expected: Result) -> None:
    """Equal to the rounding of three layers, forward and backward, in another order of sums."""
    for got, want, what in zip(actual, expected, ("FSD", "dQ/dφ"), strict=True):
        # O(1) parameters, inputs and outputs: 20 tokens' terms of 5 sums, none larger than 10
        assert_close(got, want, FUNCTION, size=20, iterations=9, scale=10.0, what=what)


def both(z: Tensor, z0: Tensor) -> Tensor:
    """By hand: KL of the first three outputs and ½‖·‖² of the rest."""
    p, p0 = z[..., :3].log_softmax(-1), z0[..., :3].log_softmax(-1)
    kl = (p.exp() * (p - p0)).sum((1, 2))
    return (kl + 0.5 * (z - z0)[..., 3:].square().sum((1, 2))).mean()


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "tuple": (lambda a, b: (a, b), {0: "kl", 1: "squared_error"}),
    "list": (lambda a, b: [a, b], {0: "kl", 1: "squared_error"}),
    "named tuple": (lambda a, b: Pair(a, b), {0: "kl", 1: "squared_error"}),
    "dictionary": (lambda a, b: {"l": a, "v": b}, {"l": "kl", "v": "squared_error"}),
    "in another order": (lambda a, b: {"v": b, "l": a}, {"l": "kl", "v": "squared_error"}),
    "model output": (
        lambda a, b: ModelOutput(logits=a, loss=None, cache=object(), values=b),
        {"logits": apo.CategoricalKL(), "values": apo.SquaredEuclidean()},
    ),
}


@same_outputs
@pytest.mark.parametrize("fsd", FSDS)
@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds)
@share(0.25)
def test_each_output_has_its_discrepancy_and_they_are_summed(
    fsd: str, form: str, seed: int
) -> None:
    returned, discrepancy = FORMS[form]
    expected = result(seed, lambda a, b: torch.cat([a, b], -1), both, fsd)
    assert_same(result(seed, returned, discrepancy, fsd), expected)


@same_outputs
@pytest.mark.parametrize("fsd", FSDS)
@given(seed=seeds)
@share(0.25)
def test_one_discrepancy_serves_every_output(fsd: str, seed: int) -> None:
    """½‖·‖² of both is ½‖·‖² of both side by side."""
    expected = result(seed, lambda a, b: torch.cat([a, b], -1), "squared_error", fsd)
    assert_same(result(seed, lambda a, b: (a, b), "squared_error", fsd), expected)


@pytest.mark.parametrize("fsd", FSDS)
@given(seed=seeds)
@share(0.25)
def test_one_output_in_any_form_is_that_tensor(fsd: str, seed: int) -> None:
    """Bit for bit; an entry without a discrepancy does not count."""
    value, slope = result(seed, lambda a, b: a, "kl", fsd)
    for returned, discrepancy in (
        (lambda a, b: (a,), "kl"),
        (lambda a, b: {"logits": a}, "kl"),
        (lambda a, b: {"logits": a, "values": b}, {"logits": "kl"}),
        (lambda a, b: (b, a), {1: "kl"}),
        (lambda a, b: ModelOutput(logits=a).logits, "kl"),
    ):
        other_value, other_slope = result(seed, returned, discrepancy, fsd)
        assert value == other_value
        assert np.array_equal(slope, other_slope)


def random_mask(seed: int, shape: tuple[int, ...]) -> Tensor:
    """True somewhere."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask.view(-1)[seed % mask.numel()] = True
    return mask


@same_outputs
@pytest.mark.parametrize("fsd", FSDS)
@pytest.mark.parametrize("shape", [(3,), (3, 4)], ids=["examples", "tokens"])
@given(seed=seeds)
@share(0.25)
def test_a_mask_is_the_mean_over_what_it_leaves(
    fsd: str, shape: tuple[int, ...], seed: int
) -> None:
    """As if the rest had been cut out of the tensor by the user."""
    mask = random_mask(seed, shape)
    expected = result(seed, lambda a, b: (a[mask], b[mask]), "kl", fsd)
    masked = lambda a, b: (apo.Masked(a, mask), apo.Masked(b, mask))  # noqa: E731
    assert_same(result(seed, masked, "kl", fsd), expected)


@same_outputs
@pytest.mark.parametrize("fsd", FSDS)
@given(seed=seeds, factor=st.sampled_from([0.25, 1.0, 3.0]))
@share(0.25)
def test_a_weight_of_n_is_n_examples(fsd: str, seed: int, factor: float) -> None:
    """A common factor of all weights has no effect."""
    counts = torch.tensor([[0, 1, 2, 3], [1, 1, 0, 0], [2, 0, 1, seed % 3]])
    repeated = result(
        seed,
        lambda a, b: a.flatten(0, 1).repeat_interleave(counts.flatten(), 0),
        "kl",
        fsd,
    )
    assert_same(result(seed, lambda a, b: apo.Masked(a, factor * counts), "kl", fsd), repeated)


@same_outputs
@pytest.mark.parametrize("fsd", FSDS)
@given(seed=seeds)
@share(0.25)
def test_a_mask_of_ones_for_the_examples_is_none(fsd: str, seed: int) -> None:
    ones = torch.ones(3, dtype=torch.bool)
    expected = result(seed, lambda a, b: a, "bernoulli_kl", fsd)
    assert_same(result(seed, lambda a, b: apo.Masked(a, ones), "bernoulli_kl", fsd), expected)


@pytest.mark.parametrize("fsd", FSDS)
@pytest.mark.parametrize("padding", [7.0, torch.inf, torch.nan])
def test_padding_is_never_looked_at(fsd: str, padding: float) -> None:
    """Whatever stands there, Q and dQ/dφ are the same bit for bit."""
    mask = random_mask(1, (3, 4))

    def padded(value: float) -> Result:
        fill = (~mask).unsqueeze(-1)
        return result(
            1, lambda a, b: {"l": apo.Masked(a.masked_fill(fill, value), mask)}, {"l": "kl"}, fsd
        )

    first, second = padded(0.0), padded(padding)
    assert first[0] == second[0] > 0.0
    assert np.array_equal(first[1], second[1])


@pytest.mark.parametrize("fsd", FSDS)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_output_that_is_not_finite_is_no_error_and_gives_no_meta_gradient(
    fsd: str, bad: float
) -> None:
    """So that a training skips the meta-step and goes on."""
    first = torch.zeros(3, 4, 1, dtype=torch.float64)
    first[0, 0] = bad
    with (
        pytest.warns(RuntimeWarning, match=r"a meta-step was skipped since the FSD .* not finite"),
        pytest.raises(ValueError, match="`parameter` must have a gradient, got None"),
    ):
        result(0, lambda a, b: {"a": a, "b": b + first}, "kl", fsd)


@pytest.mark.parametrize("name", ALL_DISCREPANCIES)
@given(seed=seeds)
def test_a_masked_discrepancy_is_the_oracles_weighted_mean(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape, rho = output_shape(name, rng), ALL_DISCREPANCIES[name]
    z0 = outputs(name, shape, 3.0, rng)
    z, weights = z0 + outputs(name, shape, 3.0, rng), rng.integers(0, 4, len(z0)).astype(float)
    weights[0] += 1.0
    assert_close(
        float(bridge.discrepancy(rho).masked(*map(bridge.tensor, (z, z0, weights)))),
        np.float64(_by_loop(rho, z, z0, weights)),
        FUNCTION,
        size=z.size,
        iterations=3,
        scale=divergence_size(name, z, z0),
        what="D_F",
    )


def _by_loop(rho: Discrepancy, z: np.ndarray, z0: np.ndarray, weights: np.ndarray) -> float:
    total = 0.0
    for w, one, other in zip(weights, z, z0, strict=True):
        total += w * float(rho.value(one[None], other[None])[0])
    return total / float(weights.sum())


ONES = torch.ones(3, 4)

BAD: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any, type[Exception], str]] = {
    "no tensor": (
        lambda a, b: {"logits": a, "cache": object()},
        "kl",
        TypeError,
        r"`outputs\['cache'\]` must return a tensor .*, got object; .* a mapping as `discrepancy`",
    ),
    "nested": (
        lambda a, b: (a, (a, b)),
        "kl",
        TypeError,
        r"`outputs\[1\]` must return a tensor \(batch, ..., outputs\), got tuple",
    ),
    "a loss": (
        lambda a, b: {"loss": a.sum(), "logits": a},
        "kl",
        TypeError,
        r"`outputs\['loss'\]` must return a tensor .*, got a 0-d tensor",
    ),
    "nothing": (
        lambda a, b: (),
        "kl",
        ValueError,
        "`outputs` must return at least one tensor, got an empty tuple",
    ),
    "no such entry": (
        lambda a, b: {"logits": a},
        {"logit": "kl"},
        ValueError,
        r"`outputs` must have an entry 'logit', .*, got dict with \['logits'\]; name the entries",
    ),
    "a mapping for one tensor": (
        lambda a, b: a,
        {"logits": "kl"},
        ValueError,
        r"`outputs` must have an entry 'logits', .*, got Tensor with \[None\]",
    ),
    "a mask of other shape": (
        lambda a, b: apo.Masked(a, ONES[:, :2]),
        "kl",
        ValueError,
        r"the mask of `outputs` must be a tensor .* \(3, 4, 3\), got \(3, 2\); give one weight",
    ),
    "a 0-d mask": (
        lambda a, b: [apo.Masked(a, ONES.sum())],
        "kl",
        ValueError,
        r"the mask of `outputs\[0\]` must be a tensor .*, got Tensor; give one weight",
    ),
    "no mask": (
        lambda a, b: apo.Masked(a, None),  # pyright: ignore[reportArgumentType]
        "kl",
        ValueError,
        "the mask of `outputs` must be a tensor .*, got NoneType; give one weight",
    ),
    "padding alone": (
        lambda a, b: apo.Masked(a, 0 * ONES),
        "kl",
        ValueError,
        "the mask of `outputs` must be bool or finite non-negative weights, some .*; leave out a",
    ),
    "a negative weight": (
        lambda a, b: apo.Masked(a, ONES - 2 * (ONES.cumsum(1) == 4)),
        "kl",
        ValueError,
        "the mask of `outputs` must be bool or finite non-negative weights, some of them positive",
    ),
    "a callable with a mask": (
        lambda a, b: apo.Masked(a, ONES),
        both,
        TypeError,
        "`discrepancy` must be a Discrepancy where `outputs` are Masked, got function; subclass",
    ),
}


@pytest.mark.parametrize("fsd", FSDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_outputs(fsd: str, name: str) -> None:
    returned, discrepancy, error, message = BAD[name]
    with pytest.raises(error, match=message):
        result(0, returned, discrepancy, fsd)


@pytest.mark.parametrize(
    ("fsd", "message"),
    [
        ("exact", "`discrepancy` must return a tensor that depends on the parameters"),
        ("quadratic", r"`outputs\[1\]` must return a tensor that depends on the parameters"),
    ],
)
def test_an_output_without_a_graph(fsd: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        result(0, lambda a, b: (a, b.detach()), "kl", fsd)


def test_outputs_that_change_between_the_passes() -> None:
    names = iter("ab")
    message = r"`outputs` must return the same entries twice, got \['a'\] at θ and \['b'\] at θ'"
    with pytest.raises(ValueError, match=message):
        result(0, lambda a, b: {next(names): a}, "kl", "exact")
    sizes = iter((2, 3))
    message = r"`outputs\['z'\]` must return one shape, got \(2, 4, 3\) at θ and \(3, 4, 3\) at θ'"
    with pytest.raises(ValueError, match=message):
        result(0, lambda a, b: {"z": a[: next(sizes)]}, "kl", "exact")
