"""What a trained family is used for: evaluate, select, export. No DeepSpeed."""
