"""Level 2: the deterministic meta-optimization converges to the analytic optimum."""
