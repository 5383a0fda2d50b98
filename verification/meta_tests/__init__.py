"""Tests of the tests: strategies, tolerances, the ledger."""
