"""Level 0: the oracle against complex steps, mpmath, brute force and optimality conditions."""
