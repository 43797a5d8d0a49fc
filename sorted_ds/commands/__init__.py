"""One module for each command of `sorted-ds`: `run(args)` does it and returns the exit code."""
