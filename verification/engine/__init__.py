"""What the engine promises beside its values: no trace left, runs resumed, clear errors."""
