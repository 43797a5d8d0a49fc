"""Uses a trained family: evaluates, selects and exports its sub-networks, without DeepSpeed."""
