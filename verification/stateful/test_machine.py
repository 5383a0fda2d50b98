"""Steps, meta-steps, checkpoints, copies, moves, mistakes and NaN, in any order."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor, nn

from verification.engine.scenes import Scene
from verification.profiles import share
from verification.stateful.book import UPDATES, Book, build
from verification.tolerances import ROUNDING, assert_close

META_LR = 0.05
PARAMETERS = ("0.weight", "0.bias", "1.weight", "1.bias", "5.weight", "5.bias")
seeds = st.integers(0, 2**16)


class Mistake(Exception):
    """What a user's closure may raise."""


class Training(RuleBasedStateMachine):
    """An APO and the book of what it must be; every rule below is something that users do."""

    update: ClassVar[str]

    @initialize(seed=seeds)
    def begin(self, seed: int) -> None:
        self.s = build(self.update, seed, META_LR)
        self.dtype = torch.float64
        self.book = Book(UPDATES[self.update], self.s)
        self.counters = {"steps": 0, "meta_steps": 0, "skipped_steps": 0, "skipped_meta_steps": 0}

    # What training does

    @rule(seed=seeds, without=st.sampled_from([None, *PARAMETERS]))
    def step(self, seed: int, without: str | None) -> None:
        g = self.backward(seed)
        if without is not None:
            dict(self.s.model.named_parameters())[without].grad = None
        self.s.optimizer.step()
        self.book.step(g, without)
        self.counters["steps"] += 1
        self.check()

    @rule(seed=seeds)
    def meta_step(self, seed: int) -> None:
        g = self.backward(seed)
        random = torch.get_rng_state()
        terms = self.s.meta_step()
        assert torch.equal(random, torch.get_rng_state())
        s = self.s
        q = self.book.meta_step(g, s.x, s.y, s.x_other, META_LR)
        self.close(terms.total, q, "Q")
        self.counters["meta_steps"] += 1
        self.check()

    @rule(training=st.booleans())
    def switch_mode(self, training: bool) -> None:
        self.s.model.train(training)
        self.book.model.train(training)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def move(self, dtype: torch.dtype) -> None:
        self.s.model.to(dtype)
        self.s.x, self.s.x_other = self.s.x.to(dtype), self.s.x_other.to(dtype)
        self.dtype = dtype
        self.book.adopt(self.s)

    @rule(scale=st.sampled_from([0.25, 0.9, 1.0]), weight=st.sampled_from([0.0, 0.3, 2.0]))
    def schedule(self, scale: float, weight: float) -> None:
        self.s.optimizer.param_groups[0]["lr"] = scale
        self.s.optimizer.objective.fsd_weight = weight
        self.book.adopt(self.s)

    # What saves and copies

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        saved = {"model": self.s.model.state_dict(), "optimizer": self.s.optimizer.state_dict()}
        torch.save(saved, file)
        other = build(self.update, 77, META_LR)
        other.model.to(self.dtype).train(self.s.model.training)
        other.optimizer.objective.fsd_weight = self.s.optimizer.objective.fsd_weight
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        other.model.load_state_dict(loaded["model"])
        other.optimizer.load_state_dict(loaded["optimizer"])
        self.replace_by(other)

    @rule()
    def deep_copy(self) -> None:
        self.replace_by(copy.deepcopy(self.s))

    @rule()
    def pickle(self) -> None:
        self.replace_by(pickle.loads(pickle.dumps(self.s)))

    # What goes wrong

    @rule(seed=seeds, value=st.sampled_from([math.nan, math.inf]))
    def bad_gradient(self, seed: int, value: float) -> None:
        self.backward(seed)
        bad = dict(self.s.model.named_parameters())[PARAMETERS[seed % len(PARAMETERS)]].grad
        assert bad is not None
        bad.view(-1)[-1] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.s.meta_step()
            self.s.optimizer.step()
        for name in ("steps", "skipped_steps", "skipped_meta_steps"):
            self.counters[name] += 1
        self.check()

    @rule(seed=seeds)
    def bad_mini_batch(self, seed: int) -> None:
        self.backward(seed)
        self.s.x[0] = math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.s.meta_step()
        self.counters["skipped_meta_steps"] += 1
        self.check()

    @rule(seed=seeds, after=st.integers(0, 2))
    def exception_in_a_closure(self, seed: int, after: int) -> None:
        """In the pass at θ, or in one of the two at θ'."""
        self.backward(seed)
        if self.s.optimizer.objective.fsd_weight == 0:
            after = 0
        passes = iter(range(3))

        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            if next(passes) == after:
                raise Mistake

        handle = self.s.model.register_forward_hook(count)
        random = torch.get_rng_state()
        with pytest.raises(Mistake):
            self.s.meta_step()
        handle.remove()
        assert torch.equal(random, torch.get_rng_state())
        self.check()

    @rule()
    def exception_in_the_closure_of_a_step(self) -> None:
        def closure() -> Tensor:
            raise Mistake

        with pytest.raises(Mistake):
            self.s.optimizer.step(closure)
        self.check()

    @rule()
    def no_gradient(self) -> None:
        self.s.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="a parameter must have a gradient"):
            self.s.optimizer.step()
        with pytest.raises(RuntimeError, match="a parameter must have a gradient"):
            self.s.meta_step()
        self.check()

    @rule()
    def another_parameter_group(self) -> None:
        with pytest.raises(RuntimeError, match="must stay as they were built"):
            self.s.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        self.check()

    # How it is checked

    def backward(self, seed: int) -> dict[str, Tensor]:
        """A new mini-batch pair; g into `.grad`, and by the book; both draw alike."""
        s, generator = self.s, torch.Generator().manual_seed(seed)
        x, other = torch.randn(2, *s.x.shape, generator=generator, dtype=torch.float64)
        s.x, s.x_other = x.to(self.dtype), other.to(self.dtype)
        s.y = torch.randint(3, s.y.shape, generator=generator)
        random = torch.get_rng_state()
        s.backward()
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        g = self.book.gradients(s.x, s.y)
        assert torch.equal(after, torch.get_rng_state())
        return g

    def replace_by(self, other: Scene) -> None:
        """Both go on bit for bit alike from here; the other one takes its place."""
        ends = []
        random = torch.get_rng_state()
        for one in (copy.deepcopy(self.s), copy.deepcopy(other)):
            torch.manual_seed(5)
            one.x, one.x_other, one.y = self.s.x, self.s.x_other, self.s.y
            one.run(2)
            state = one.optimizer.rule_state.values()
            held = [*one.model.state_dict().values(), *one.optimizer.rule.parameters()]
            ends.append([*held, *(t for ts in state for t in ts)])
        torch.set_rng_state(random)
        for mine, theirs in zip(*ends, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        other.x, other.x_other, other.y = self.s.x, self.s.x_other, self.s.y
        self.s = other
        self.check()

    def close(self, actual: Tensor, expected: Tensor, what: str) -> None:
        """One operation apart: two layers there and back, thrice, with sums of at most 36 terms.

        Rounding errors of a sum are as good as independent: they add up as √n.
        """
        actual, expected = actual.detach(), expected.detach()
        assert_close(
            actual.to(self.dtype).numpy(),
            expected.to(self.dtype).numpy(),
            ROUNDING.at(np.float32 if self.dtype == torch.float32 else np.float64),
            size=6,
            iterations=12,
            scale=1.0 + float(expected.norm()),
            what=what,
        )

    def check(self) -> None:
        """θ, buffers, φ and all memories are those of the book; then it is brought up to date."""
        s, book = self.s, self.book
        for (name, p), expected in zip(
            s.model.named_parameters(), book.model.parameters(), strict=True
        ):
            assert p.dtype == self.dtype
            self.close(p, expected, name)
        for (name, b), expected in zip(s.model.named_buffers(), book.model.buffers(), strict=True):
            self.close(b, expected.double(), name)
        for name, p in s.optimizer.rule.named_parameters():
            assert p.dtype == torch.float64
            self.close(p, book.phi[name], name)
            if name in book.meta_momentum:
                held = s.optimizer.meta_optimizer.state[p]["momentum_buffer"]
                self.close(held, book.meta_momentum[name], f"momentum of {name}")
        for key, tensors in book.memory.items():
            for name, t in zip(tensors, s.optimizer.rule_state[key], strict=True):
                self.close(t, tensors[name], f"{key} of {name}")
        for name, count in self.counters.items():
            assert getattr(s.optimizer, name) == count, name
        book.adopt(s)


@pytest.mark.parametrize("update", UPDATES)
def test_any_order_of_what_users_do(update: str) -> None:
    machine = type("Machine", (Training,), {"update": update})
    run_state_machine_as_test(machine, settings=settings(share(0.75), stateful_step_count=20))
