"""The conformance kit: does a third party's update rule keep the engine's contract?

```python
def test_my_rule():
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    apo_core.testing.check_update_rule(MyRule, model)
```

or, one test a check:

```python
@apo_core.testing.parametrize_with_checks([MyRule, lambda model: MyRule(model, momentum=0.9)])
def test_my_rule(check):
    check()
```

Each check is a function whose first docstring line is what it demands; its message says what was
expected, what came, and why it matters. What a rule claims in `UpdateRule.claims` is checked, what
it does not claim is skipped, with that as the reason. Needs torch alone; the second form, pytest.

A longer suite with Hypothesis runs from a checkout: `nox -s conformance -- --rule=package:Class`.
"""

from apo_core.testing.claims import CLAIMS
from apo_core.testing.suite import CHECKS, Result, check_update_rule, parametrize_with_checks
from apo_core.testing.trial import Build, NotApplicable, Task, Trial

__all__ = [
    "CHECKS",
    "CLAIMS",
    "Build",
    "NotApplicable",
    "Result",
    "Task",
    "Trial",
    "check_update_rule",
    "parametrize_with_checks",
]
