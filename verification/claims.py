"""The claims ledger: every claim of the two papers, its declared status, and its evidence.

`claims.toml` has one `[[claim]]` per id:

| key     | meaning                                                                              |
|---------|--------------------------------------------------------------------------------------|
| id      | unique, `p22-...` or `p18-...`                                                       |
| claim   | what is claimed, in our own words, one line                                          |
| source  | where the paper says so                                                              |
| status  | verified, reproduced, partly, refuted or open                                        |
| tests   | evidence: pytest node ids; one of a parametrized test covers all its parameters      |
| records | evidence: experiment records, JSON files relative to the repository's root           |
| note    | what was shown, at which reduced scale, or what is missing                           |

A refuted claim says what is true instead; its `tests` verify that:

| key             | meaning                                                                      |
|-----------------|------------------------------------------------------------------------------|
| counterexamples | pytest node ids: the printed statement fails                                 |
| correction      | the corrected statement                                                      |

A slip of the pen in what a claim rests on is a `[[claim.errata]]` table, which the README lists:

| key     | meaning                                                                              |
|---------|--------------------------------------------------------------------------------------|
| where   | the equation or passage                                                              |
| printed | what it says                                                                         |
| meant   | what was meant                                                                       |
| tests   | pytest node ids: what the printed form gives, and the meant one                      |

A declared status is an upper bound: what a run shows, its own tests decide (`shown_status`).
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final

ROOT = Path(__file__).resolve().parent.parent
CLAIMS_FILE = Path(__file__).resolve().parent / "claims.toml"

STATUSES = ("verified", "reproduced", "partly", "refuted", "open")
# The kind of evidence without which a status means nothing.
_REQUIRED_EVIDENCE = {
    "verified": ("tests",),
    "refuted": ("tests", "counterexamples", "correction"),
    "reproduced": ("records",),
}
_LISTS = ("tests", "records", "counterexamples")
_TEXTS = ("id", "claim", "source", "status", "note", "correction")
_OPTIONAL_TEXTS = ("note", "correction")


class LedgerError(ValueError):
    """The ledger contradicts itself, the repository or the collected tests."""


@final
@dataclass(frozen=True)
class Erratum:
    """One slip; the fields are the keys of a `[[claim.errata]]` table."""

    where: str
    printed: str
    meant: str
    tests: tuple[str, ...]


@final
@dataclass(frozen=True)
class Claim:
    """One row of the ledger; the fields are the keys of `claims.toml`."""

    id: str
    claim: str
    source: str
    status: str
    tests: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    note: str = ""
    counterexamples: tuple[str, ...] = ()
    correction: str = ""
    errata: tuple[Erratum, ...] = ()

    @property
    def all_tests(self) -> tuple[str, ...]:
        """Every test that the row names, once."""
        named = [*self.counterexamples, *self.tests]
        named += [test for erratum in self.errata for test in erratum.tests]
        return tuple(dict.fromkeys(named))


def load_claims(path: Path = CLAIMS_FILE, root: Path = ROOT) -> list[Claim]:
    """Read and validate the ledger.

    Args:
        path: the TOML file.
        root: what test and record paths are relative to.

    Raises:
        LedgerError: the file is no TOML or a row breaks a rule; all violations in one message.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise LedgerError(f"{path.name} must be TOML: {error}.") from error
    rows = document.pop("claim", [])
    if document:
        raise LedgerError(f"{path.name} must hold only [[claim]] tables, got {sorted(document)}.")
    problems: list[str] = []
    claims = []
    for number, row in enumerate(rows, start=1):
        found = _malformed(row, number)
        problems += found
        if not found:
            lists = {key: tuple(row.get(key, ())) for key in _LISTS}
            errata = tuple(
                Erratum(**{**slip, "tests": tuple(slip["tests"])}) for slip in row.get("errata", ())
            )
            claims.append(Claim(**{**row, **lists, "errata": errata}))
    problems += _violations(claims, root)
    if problems:
        raise LedgerError("\n".join([f"{path.name} has {len(problems)} fault(s):", *problems]))
    return claims


def _malformed(row: Mapping[str, Any], number: int) -> list[str]:
    """Missing, unknown and wrongly typed keys of one table."""
    label = f"row {number} (`{row.get('id', 'no id')}`)"
    known = {field.name for field in fields(Claim)}
    problems = [f"{label}: unknown key `{key}`." for key in row if key not in known]
    for key in _TEXTS:
        if key not in _OPTIONAL_TEXTS and not row.get(key):
            problems.append(f"{label}: `{key}` must be given.")
        elif not isinstance(row.get(key, ""), str):
            problems.append(f"{label}: `{key}` must be a string, got {row[key]!r}.")
    for key in _LISTS:
        value = row.get(key, [])
        if not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
            problems.append(f"{label}: `{key}` must be a list of strings, got {value!r}.")
    wanted = {field.name for field in fields(Erratum)}
    for slip in row.get("errata", ()):
        if not isinstance(slip, dict) or set(slip) != wanted or not all(slip.values()):
            problems.append(f"{label}: an erratum must have {sorted(wanted)}, got {slip!r}.")
    return problems


def _violations(claims: list[Claim], root: Path) -> list[str]:
    """Contradictions between well-formed rows, and evidence whose file does not exist."""
    counts = Counter(claim.id for claim in claims)
    problems = [f"`{id_}`: {n} rows where one is allowed." for id_, n in counts.items() if n > 1]
    for claim in claims:
        label = f"`{claim.id}`"
        evidence = claim.all_tests + claim.records
        if claim.status not in STATUSES:
            problems.append(
                f"{label}: `status` must be one of {list(STATUSES)}, got {claim.status!r}."
            )
        if claim.status == "open" and evidence:
            problems.append(f"{label}: is open and yet has evidence; decide its status.")
        if claim.status != "open" and not evidence:
            problems.append(f"{label}: is {claim.status} without evidence; give it or say open.")
        problems += [
            f"{label}: is {claim.status}, which requires `{required}`."
            for required in _REQUIRED_EVIDENCE.get(claim.status, ())
            if evidence and not getattr(claim, required)
        ]
        if claim.status != "refuted" and (claim.counterexamples or claim.correction):
            problems.append(f"{label}: has a counterexample or correction; say refuted.")
        if claim.status == "partly" and not claim.note:
            problems.append(
                f"{label}: is partly shown; the `note` must say what and at which scale."
            )
        problems += [
            f"{label}: `{e}` is given twice."
            for e, n in Counter(claim.counterexamples + claim.tests + claim.records).items()
            if n > 1
        ]
        for test in claim.all_tests:
            file, separator, name = test.partition("::")
            if not (separator and name):
                problems.append(f"{label}: `{test}` must be a node id, file.py::test_name.")
            elif not (root / file).is_file():
                problems.append(f"{label}: the file of `{test}` does not exist.")
        problems += [
            f"{label}: the record `{record}` does not exist."
            for record in claim.records
            if not (root / record).is_file()
        ]
    return problems


def covers(evidence: str, node_id: str) -> bool:
    """Whether a collected test is the evidence itself or one of its parametrizations."""
    return node_id == evidence or node_id.startswith(f"{evidence}[")


def missing_tests(claims: Iterable[Claim], collected: Collection[str]) -> list[str]:
    """Faults: evidence that does not exist although its file was collected."""
    files = {node_id.partition("::")[0] for node_id in collected}
    return [
        f"`{claim.id}`: no test `{test}` was collected from its file."
        for claim in claims
        for test in claim.all_tests
        if test.partition("::")[0] in files and not any(covers(test, node) for node in collected)
    ]


def evidence_of(claim: Claim, outcomes: Mapping[str, str]) -> dict[str, list[str]]:
    """The outcomes ("passed", "failed", ...) in this run of each test that the row names."""
    return {
        test: [outcome for node_id, outcome in outcomes.items() if covers(test, node_id)]
        for test in claim.all_tests
    }


def shown_status(claim: Claim, outcomes: Mapping[str, str]) -> str:
    """The status that this run supports: the declared one, `FAILED` or `not run`."""
    evidence = evidence_of(claim, outcomes)
    if any("failed" in results for results in evidence.values()):
        return "FAILED"
    if any(not results or set(results) != {"passed"} for results in evidence.values()):
        return "not run"
    return claim.status
