"""The detection limit: the smallest relative error of each core quantity that the suite notices.

    python -m verification.detection

| module | what it does |
|---|---|
| `quantities` | the core quantities, by the function that returns them |
| `errors` | puts a relative error, or a round trip through float32, on what a function returns |
| `report` | the limits, as JSON and as a table |

A quantity is noticed at epsilon if one test passes without the error and fails with it. The tests
that enter its function are selected as for the mutants, and run in forked processes.
"""
