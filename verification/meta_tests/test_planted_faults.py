"""The list of planted faults does not rot: each can still be planted, and is still a program.

Whether the suite catches them is the command's to say; in its copies this file is left out, since
it would fail for the fault's sake alone.
"""

import ast

import pytest

from verification.planted_faults import FAULTS, ROOT, Fault

faults = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


def test_each_fault_has_its_own_name() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@faults
def test_what_a_fault_replaces_stands_there_once(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1


@faults
def test_a_fault_changes_the_program_and_leaves_it_one(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    planted = ast.parse(text.replace(fault.old, fault.new))
    assert ast.dump(planted) != ast.dump(ast.parse(text))
