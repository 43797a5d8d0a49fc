"""From text to packed rows to the micro-batches of one rank. Knows no model and no DeepSpeed."""
