"""A run: its file, what follows from it, the plan, the training loop, and what it writes."""
