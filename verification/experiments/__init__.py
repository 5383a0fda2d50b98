"""Tests of the experiments' machinery: data, records, runner, report, command line; no network."""
