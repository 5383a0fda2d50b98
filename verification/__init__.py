"""The property-based suite that holds the engine against the oracle, and the claims ledger."""
