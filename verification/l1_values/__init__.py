"""Level 1: the engine against the oracle, value by value; and what a meta-step leaves alone."""
