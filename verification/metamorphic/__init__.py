"""Metamorphic relations: what a run must do when its data, model or units are transformed."""
