"""Level N: drop one assumption of a theorem, and show what breaks."""
