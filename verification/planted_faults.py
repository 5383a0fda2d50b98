"""Plant one fault at a time in a copy of the checkout, and see whether the suite notices.

    python -m verification.planted_faults [NAME ...]

Each fault is one replacement in one file. The suite's own test of this list only makes sure that it
does not rot; planting takes minutes, and is a command of its own. Exit status 1 if a fault lives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("apo_core", "reference", "verification", "experiments", "pyproject.toml", "README.md")


class Fault(NamedTuple):
    """One replacement of `old` by `new` in `file`; `old` stands there exactly once."""

    name: str
    file: str
    old: str
    new: str


FAULTS = (
    Fault(
        "the ½ of the WSD term dropped",
        "apo_core/objective.py",
        "wsd_term = 0.5 * self.wsd_weight * _inner(updates, updates)",
        "wsd_term = self.wsd_weight * _inner(updates, updates)",
    ),
    Fault(
        "the ½ of the WSD term dropped, in q",
        "apo_core/objective.py",
        "q = list(torch._foreach_mul(updates, self.wsd_weight))",
        "q = list(torch._foreach_mul(updates, 2 * self.wsd_weight))",
    ),
    Fault(
        "A and B swapped in eq. 10",
        "apo_core/preconditioners/ekfac.py",
        "product = B @ (S.square() * (B.T @ V @ A)) @ A.T",
        "product = A @ (S.square() * (A.T @ V @ B)) @ B.T",
    ),
    Fault(
        "A and B swapped in the dense eq. 9",
        "apo_core/preconditioners/ekfac.py",
        "torch.kron(self.B, self.A)",
        "torch.kron(self.A, self.B)",
    ),
    Fault(
        "A transposed in eq. 10",
        "apo_core/preconditioners/ekfac.py",
        "(B.T @ V @ A)) @ A.T",
        "(B.T @ V @ A.T)) @ A",
    ),
    Fault(
        "S instead of S² in eq. 10",
        "apo_core/preconditioners/ekfac.py",
        "product = B @ (S.square() *",
        "product = B @ (S *",
    ),
    Fault(
        "the sign of dQ/dφ",
        "apo_core/meta_gradient.py",
        "gradients[name] = gradient\n",
        "gradients[name] = -gradient\n",
    ),
    Fault(
        "the FSD on the loss's mini-batch, in the oracle",
        "reference/meta_objective.py",
        "J = self.problem.network.jacobian(lookahead, fsd_inputs)",
        "fsd_inputs = batch[0]; J = self.problem.network.jacobian(lookahead, fsd_inputs)",
    ),
    Fault(
        "the FSD on the loss's mini-batch, in the training loop",
        "experiments/training.py",
        "outputs=partial(problem.outputs, model, other)",
        "outputs=partial(problem.outputs, model, batch)",
    ),
    Fault(
        "the Fisher from the labels",
        "reference/curvature.py",
        "scores = problem.example_gradients(theta, X, y)",
        "scores = problem.example_gradients(theta, X, 0 * y)",
    ),
    Fault(
        "the lookahead left in place after a meta-step",
        "apo_core/lookahead.py",
        "torch._foreach_copy_(theta, current)",
        "pass",
    ),
    Fault(
        "the BatchNorm statistics of the lookahead kept",
        "apo_core/lookahead.py",
        "buffer.copy_(value)",
        "pass",
    ),
    Fault(
        "another dropout mask in the second FSD pass",
        "apo_core/objective.py",
        "                if current is not None:\n                    passes.rewind()\n",
        "                if current is not None:\n",
    ),
    Fault(
        "the lookahead at -Δ",
        "apo_core/lookahead.py",
        "torch._foreach_add_(theta, updates)",
        "torch._foreach_add_(theta, updates, alpha=-1)",
    ),
    Fault(
        "λ_FSD left out of q",
        "apo_core/objective.py",
        "add_slope(value, self.fsd_weight)",
        "add_slope(value, 1.0)",
    ),
    Fault(
        "KL the other way round",
        "apo_core/discrepancies.py",
        'if self.order == "current_lookahead":',
        'if self.order == "lookahead_current":',
    ),
    Fault(
        "Nesterov without μ",
        "apo_core/rules/sgd.py",
        "_added(grads, v, alpha=self.momentum) if self.nesterov",
        "_added(grads, v, alpha=1.0) if self.nesterov",
    ),
    Fault(
        "the update scale in the wrong place",
        "apo_core/optimizer.py",
        "scale = self.update_scale * self.trust.scale",
        "scale = self.trust.scale",
    ),
    Fault(
        "the second moment forgets all but the new gradient, in RMSprop",
        "apo_core/rules/rmsprop.py",
        "value=1 - self.smoothing",
        "value=self.smoothing",
    ),
    Fault(
        "the bias of v corrected as that of m, in Adam",
        "apo_core/rules/adam.py",
        "_left_over(second, steps)",
        "_left_over(first, steps)",
    ),
    Fault(
        "the lookahead moves the optimizer's own state, in LearningRate",
        "apo_core/rules/learning_rate.py",
        "NUMBERS.get(kind, Tensor.clone)(value)",
        "NUMBERS.get(kind, lambda tensor: tensor)(value)",
    ),
    Fault(
        "no derivative in the learning rate, in LearningRate",
        "apo_core/rules/learning_rate.py",
        "grow = 1.0 + (self.log_lr - self.log_lr.detach())",
        "grow = 1.0 + 2.0 * (self.log_lr - self.log_lr.detach())",
    ),
    Fault(
        "the ½ of the quadratic loss dropped",
        "apo_core/objective.py",
        "0.5 * _inner(updates, curved)",
        "1.0 * _inner(updates, curved)",
    ),
    Fault(
        "the mask's tokens not counted in the mean",
        "apo_core/discrepancies.py",
        "/ weights.sum()",
        "/ weights.numel()",
    ),
    Fault(
        "half of the corrected condition of P18 Theorem 1, in the oracle",
        "reference/output_space.py",
        "return max(C * G, L) / 2.0",
        "return max(C * G, L) / 4.0",
    ),
    Fault(
        "2 lambda for lambda in eq. 14, in the oracle",
        "reference/output_space.py",
        "manifold.project(Z - gradient / (2.0 * weight))",
        "manifold.project(Z - gradient / weight)",
    ),
    Fault(
        "the geodesic of Lemma 1 uphill, in the oracle",
        "reference/output_space.py",
        "manifold.geodesic(Z, -g / norm,",
        "manifold.geodesic(Z, g / norm,",
    ),
    Fault(
        "the noise left out of a step on the noisy quadratic, in the oracle",
        "reference/noisy_quadratic.py",
        "+ sh**2 * self.v)",
        "+ sh * self.v)",
    ),
    Fault(
        "the adjoint of a schedule without its square, in the oracle",
        "reference/schedules.py",
        "p = p * (1.0 - eta * k) ** 2",
        "p = p * (1.0 - eta * k)",
    ),
    Fault(
        "KFC's B summed over the positions, in the oracle",
        "reference/curvature.py",
        "/ (N * T)",
        "/ N",
    ),
    Fault(
        "conjugate gradients without conjugation, in the oracle",
        "reference/classical_methods.py",
        "direction = residual + (residual @ residual) / square * direction",
        "direction = residual",
    ),
    Fault(
        "the Bernoulli KL's slope without 1 - p, in the oracle",
        "reference/discrepancies.py",
        "return p * (1.0 - p) * (z - z0) if",
        "return p * (z - z0) if",
    ),
    Fault(
        "a non-finite update taken",
        "apo_core/safety.py",
        '    if finite.device.type == "cpu" and bool(finite):\n        return tensors\n',
        '    if finite.device.type == "cpu":\n        return tensors\n',
    ),
    Fault(
        "the state of a skipped step kept",
        "apo_core/optimizer.py",
        "choose_state(finite, next_state, self.rule_state)",
        "next_state",
    ),
    Fault(
        "the trust region's scale left out of dQ/dφ",
        "apo_core/meta_gradient.py",
        "if step_scale != 1.0:\n            q =",
        "if False:\n            q =",
    ),
    Fault(
        "the loss scale not divided out",
        "apo_core/objective.py",
        "alpha=weight / scale",
        "alpha=weight",
    ),
    Fault(
        "shards averaged instead of summed",
        "apo_core/meta_gradient.py",
        "step_scale *= parts",
        "pass",
    ),
)


def planted(fault: Fault, folder: Path) -> Path:
    """A copy of the checkout under `folder` with `fault` in it."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy / name)
    target = copy / fault.file
    text = target.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(
            f"`old` of the fault {fault.name!r} must stand once in {fault.file}, got "
            f"{text.count(fault.old)} times; bring the list up to date."
        )
    target.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return copy


def first_failure(checkout: Path) -> str | None:
    """The first test of the suite that fails in `checkout`, or None."""
    # The list's own test fails in every copy, whatever the fault does.
    own = "--ignore=verification/meta_tests/test_planted_faults.py"
    arguments = ["verification", own, "-x", "-q", "--no-header", "-n", "auto"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=checkout,
        # The profile with the fewest examples: what it catches, every profile does.
        env=os.environ | {"APO_PROFILE": "quick"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else f"exit status {run.returncode}"


def main(names: list[str]) -> int:
    """Plant the faults whose names contain one of `names`, or all; 0 if every one is caught."""
    chosen = [f for f in FAULTS if not names or any(name in f.name for name in names)]
    alive = 0
    for fault in chosen:
        with tempfile.TemporaryDirectory() as folder:
            failure = first_failure(planted(fault, Path(folder)))
        alive += failure is None
        print(
            f"{'LIVES ' if failure is None else 'caught'}  {fault.name}: {failure or '-'}",
            flush=True,
        )
    print(f"{len(chosen) - alive} passed, {alive} failed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
