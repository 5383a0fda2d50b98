"""Mutation testing: change one operation at a time, and see whether a test notices.

    python -m verification.mutation --budget 20        # minutes; an interrupted run goes on

| module | what it does |
|---|---|
| `mutants` | finds what can be changed in a module, and compiles one change |
| `suite` | collects the tests once, in the profile with the fewest examples |
| `forking` | one process a mutant, forked from the one that has collected |
| `cold` | a second trial of survivors, in a fresh process |
| `selection` | which tests run which statement, and how long each takes |
| `records` | one line a mutant, and the score with its interval |
| `report` | the score of every module, and each survivor with its reason |

Survivors dominate the time, so that a first pass gives each mutant a few seconds of tests (those
first that have killed others of its file), and a second one more to what survived, but for what
`survivors.toml` tells to be equivalent. Both go on where a run was interrupted; `--again` tries
survivors anew once there are new tests.

A mutant is a new code object for one function, put in place in a forked process: nothing is
imported twice, and no file is touched. What stands outside of functions is not mutated (constants
of modules and classes, default arguments, decorators). What a fork cannot show, since the
tests computed it when they were imported, a fresh process may.
"""
