"""Writes text with a sub-network, with or without a smaller one that proposes tokens."""
