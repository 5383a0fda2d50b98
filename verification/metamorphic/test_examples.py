"""What is done to the examples of a mini-batch: order, copies, parts; and to the list of layers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verification.metamorphic.training import (
    EXAMPLES,
    RULES,
    Batches,
    Result,
    Setting,
    build,
    compare,
    run,
    setting,
)
from verification.profiles import share

SEEDS = st.integers(0, 2**16)


def same(transformed: Setting, start: Setting) -> None:
    """Both runs leave the same."""
    compare(run(transformed), run(start), start)


@pytest.mark.parametrize("rule", RULES)
@share(0.05)
@given(seed=SEEDS)
def test_the_order_of_the_examples_does_not_count(rule: str, seed: int) -> None:
    """Q(φ; πB, π'B') = Q(φ; B, B') for all permutations of the examples."""
    start = setting(rule, seed)
    batches = []
    for x, y, x_other in start.batches:
        order, other = torch.randperm(EXAMPLES), torch.randperm(EXAMPLES)
        batches.append(Batches(x[order], y[order], x_other[other]))
    same(replace(start, batches=batches), start)


@pytest.mark.parametrize("rule", RULES)
@share(0.05)
@given(seed=SEEDS, copies=st.integers(2, 3))
def test_copies_of_every_example_do_not_count(rule: str, seed: int, copies: int) -> None:
    """Q(φ; B ∪ B, B' ∪ B') = Q(φ; B, B'): loss, FSD and K-FAC's factors are means."""
    start = setting(rule, seed)
    batches = [
        Batches(x.repeat(copies, 1), y.repeat(copies), x_other.repeat(copies, 1))
        for x, y, x_other in start.batches
    ]
    same(replace(start, batches=batches), start)


@pytest.mark.parametrize("rule", RULES)
@share(0.05)
@given(seed=SEEDS)
def test_the_order_of_the_layers_in_the_parameter_list_does_not_count(rule: str, seed: int) -> None:
    """θ' and Q are the same by name, whichever layer is registered first."""
    start = setting(rule, seed)
    swapped = run(replace(start, order=("last", "first")))
    compare(swapped, run(start), start, phi=False)


@pytest.mark.parametrize("rule", RULES)
@share(0.05)
@given(seed=SEEDS, first=st.integers(1, EXAMPLES - 1))
def test_a_mini_batch_in_parts_has_the_same_meta_gradient(rule: str, seed: int, first: int) -> None:
    """dQ(B, B') = Σ_k (N_k/N) dQ(B, B'_k), with g = Σ_k (N_k/N) g_k of the parts of B.

    The loss's own part of Q stands in every addend, so that the weights, which add up to 1, leave
    it as it is.
    """
    start = replace(setting(rule, seed))
    start = replace(start, batches=start.batches[:1])
    x, y, x_other = start.batches[0]
    shares = (first / EXAMPLES, 1 - first / EXAMPLES)
    optimizer = build(start)
    model, chosen = optimizer.model, optimizer.rule

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x), y)

    def backward() -> None:
        for weight, rows in zip(shares, (slice(first), slice(first, None)), strict=True):
            part = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            (weight * part).backward()

    observe = getattr(chosen, "observe", None)
    if observe is None:
        backward()
    else:
        with observe(model):
            backward()
    terms = torch.zeros(3, dtype=torch.float64)
    for weight, part in zip(shares, x_other.split([first, EXAMPLES - first]), strict=True):
        found = optimizer.meta_backward(
            loss=loss, outputs=lambda part=part: model(part), weight=weight
        )
        terms += weight * torch.stack(found)
    slopes = {n: p.grad.clone() for n, p in chosen.named_parameters() if p.grad is not None}
    optimizer.meta_optimizer.step()
    optimizer.step()
    theta = {name: p.detach() for name, p in model.named_parameters()}
    phi = {name: p.detach() for name, p in chosen.named_parameters()}
    compare(Result(terms[None], slopes, theta, phi), run(start), start)
