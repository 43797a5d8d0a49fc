"""How good sub-networks are: against the same sizes trained alone, at equal cost."""
