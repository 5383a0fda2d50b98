"""The engine and the oracle against other people's code, wherever it is installed (`[peers]`)."""
