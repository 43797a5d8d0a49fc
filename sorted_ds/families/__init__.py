"""The architectures that can be nested, a table for each kind; and `nest`, which finds a model's family."""
