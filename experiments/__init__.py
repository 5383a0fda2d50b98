"""The tables and figures of the papers: `python -m experiments list | run | report`."""
