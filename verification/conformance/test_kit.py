"""The kit accepts the engine's rules, and rejects each faulty one for its fault."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from apo_core.testing import CHECKS, CLAIMS, check_update_rule, contract, parametrize_with_checks
from apo_core.testing.suite import perceptron
from verification.conformance.conftest import load
from verification.conformance.faulty import FAULTS, FAULTY_RULES, HONEST, HeavyBall
from verification.conformance.own_rules import RULES
from verification.examples.softsign import Softsign

CHECK_OF = {
    "descent": "descent",
    "psd": "psd",
    "linear in phi": "linear in phi",
    "scale invariant": "scale invariance",
    "scale equivariant": "scale equivariance",
    "translation invariant": "translation invariance",
    "permutation equivariant": "permutation equivariance",
    "rotation equivariant": "rotation equivariance",
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_conforms(name: str) -> None:
    results = check_update_rule(RULES[name], perceptron())
    passed = {check for check, result in results.items() if result.outcome == "passed"}
    assert passed >= {CHECK_OF[claim] for claim in RULES[name].claims}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_claims_all_that_holds(name: str) -> None:
    """A claim that is added is rejected."""
    for claim in set(CLAIMS) - RULES[name].claims:
        bold = dataclasses.replace(RULES[name], claims=frozenset({claim}))
        with pytest.raises(AssertionError, match=f"fails `{CHECK_OF[claim]}`"):
            check_update_rule(bold, perceptron(), checks=[CHECK_OF[claim]])


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(name: str) -> None:
    fault = FAULTS[name]

    def build(model: nn.Module) -> HeavyBall:
        return HeavyBall(model, fault.step, fault.claims)

    with pytest.raises(AssertionError, match=f"HeavyBall fails `{fault.check}`: .*{fault.message}"):
        check_update_rule(build, perceptron(), checks=[fault.check])


@pytest.mark.parametrize("name", FAULTY_RULES)
def test_every_faulty_rule_is_named(name: str) -> None:
    build, check, message = FAULTY_RULES[name]
    with pytest.raises(AssertionError, match=f"(?s)HeavyBall fails `{check}`: .*{message}"):
        check_update_rule(build, perceptron(), checks=[check])


@pytest.mark.parametrize(
    "name",
    [
        "counts its calls",
        "the wrong sign",
        "an indefinite P",
        "forgets its state",
        "φ without effect",
    ],
)
def test_the_whole_kit_stops_at_the_fault(name: str) -> None:
    """Among all the checks the one that names the fault is the first to fail."""
    fault = FAULTS[name]
    with pytest.raises(AssertionError, match=f"fails `{fault.check}`: .*{fault.message}"):
        check_update_rule(lambda model: HeavyBall(model, fault.step, fault.claims), perceptron())


def test_every_check_has_a_fault_that_it_catches() -> None:
    """But for other devices, of which there may be none here."""
    caught = {fault.check for fault in FAULTS.values()}
    caught |= {check for _, check, _ in FAULTY_RULES.values()}
    uncaught = set(CHECKS) - caught
    assert uncaught == {"devices", "elementwise"}


def test_the_rule_without_a_fault_conforms() -> None:
    results = check_update_rule(lambda model: HeavyBall(model, claims=HONEST), perceptron())
    assert [name for name, r in results.items() if r.outcome != "passed"] == [
        "empty state",
        "dense",
        "linear in phi",
        "scale invariance",
        "elementwise",
        "optimum",
        "devices",
    ]


def test_another_step_on_an_accelerator_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the place of an accelerator."""
    monkeypatch.setattr(contract, "ACCELERATORS", ("cpu",))
    assert check_update_rule(Softsign, perceptron(), checks=["devices"])["devices"] == (
        "passed",
        "",
    )

    def build(model: nn.Module) -> HeavyBall:
        return HeavyBall(model, FAULTS["replicas differ"].step)

    with pytest.raises(AssertionError, match="the update on cpu must be that of the CPU, got a re"):
        check_update_rule(build, perceptron(), checks=["devices"])


def test_an_elementwise_rule_that_is_none_is_rejected() -> None:
    def build(model: nn.Module) -> HeavyBall:
        rule = HeavyBall(model, FAULTS["0 / 0 at a zero gradient"].step)
        rule.elementwise = True
        return rule

    with pytest.raises(AssertionError, match="must change no other entry of the update, got 16"):
        check_update_rule(build, perceptron(), checks=["elementwise"])


def test_the_kit_leaves_no_trace() -> None:
    model = perceptron()
    rule = Softsign(model)
    before = [t.clone() for t in [*model.parameters(), *rule.parameters(), torch.get_rng_state()]]
    check_update_rule(rule, model)
    after = [*model.parameters(), *rule.parameters(), torch.get_rng_state()]
    assert all(map(torch.equal, before, after))
    assert all(p.grad is None for p in [*model.parameters(), *rule.parameters()])


def test_what_needs_a_factory_is_skipped_for_an_instance() -> None:
    model = perceptron()
    results = check_update_rule(Softsign(model), model)
    assert results["dtypes"].outcome == "skipped"
    assert results["dtypes"].reason == "it needs the rule's class or a factory, got an instance"
    assert check_update_rule(Softsign, model)["dtypes"].outcome == "passed"


def test_an_expected_failure_is_reported_with_its_reason() -> None:
    def build(model: nn.Module) -> HeavyBall:
        return HeavyBall(model, FAULTS["knows places"].step, frozenset({"permutation equivariant"}))

    check, reason = "permutation equivariance", "a cumulative sum has an order"
    results = check_update_rule(build, perceptron(), expected_failures={check: reason})
    assert results[check] == ("expected failure", reason)


def test_an_expected_failure_that_passes_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"Softsign passes `purity`, which was expected to "):
        check_update_rule(Softsign, perceptron(), expected_failures={"purity": "it is not"})


@parametrize_with_checks([Softsign, lambda model: Softsign(model, lr=0.3)])
def test_softsign_conforms_check_by_check(check: Any) -> None:
    check()


def test_parameters_of_pytest_are_named_marked_and_skip() -> None:
    cases = parametrize_with_checks([Softsign], expected_failures={"psd": "it is no matrix"})
    parameters = {case.id: case for case in cases.args[1]}
    assert list(parameters) == [f"Softsign-{name}" for name in CHECKS]
    marked = {name: case.marks for name, case in parameters.items() if case.marks}
    assert list(marked) == ["Softsign-psd"]
    (mark,) = marked["Softsign-psd"]
    assert mark.name == "xfail"
    assert mark.kwargs == {"reason": "it is no matrix", "raises": AssertionError, "strict": True}
    with pytest.raises(pytest.skip.Exception, match="does not claim `psd`"):
        parameters["Softsign-psd"].values[0]()


@pytest.mark.parametrize("argument", ["checks", "expected_failures"])
def test_an_unknown_check_is_refused(argument: str) -> None:
    arguments: dict[str, Any] = {argument: {"speed": "?"}}
    with pytest.raises(ValueError, match=rf"`{argument}` must be chosen from .* got \['speed'\]"):
        check_update_rule(Softsign, perceptron(), **arguments)
    with pytest.raises(ValueError, match="`expected_failures` must be chosen from"):
        parametrize_with_checks([Softsign], expected_failures={"speed": "?"})


def test_only_rules_are_checked() -> None:
    model = perceptron()
    for wrong in (model, lambda model: model):
        with pytest.raises(TypeError, match="`rule` must be an UpdateRule, or make one, got Seq"):
            check_update_rule(wrong, model)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere.to_be:Found",
            r"`--rule` must be PACKAGE.MODULE:NAME of a class or function .* .No module",
        ),
        ("torch:Nothing", "`--rule` must be .* has no attribute 'Nothing'"),
        ("torch", "`--rule` must be PACKAGE.MODULE:NAME"),
        (":Softsign", "`--rule` must be PACKAGE.MODULE:NAME"),
        ("math:pi", "`--rule` must name a class or a function model -> rule, got 'math:pi', a flo"),
    ],
)
def test_a_rule_that_cannot_be_loaded_is_a_usage_error(name: str, message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        load(name)


def test_a_rule_is_loaded_by_its_name() -> None:
    assert load("verification.examples.softsign:Softsign") is Softsign


def test_every_claim_has_a_check() -> None:
    assert set(CHECK_OF) == set(CLAIMS)
    assert set(CHECK_OF.values()) <= set(CHECKS)
    assert all((check.__doc__ or "").strip() for check in CHECKS.values())
