"""A run: its file, what follows from it, the plan, the loop, and what it writes."""
