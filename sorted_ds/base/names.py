"""Names that several folders write or read: of metrics, files and values. Nothing here imports torch."""

LOSS, ACCURACY = "loss", "accuracy"
"""Metrics. Every task has a loss."""
CONFIG_JSON, CARD = "config.json", "README.md"
"""Files of a Hugging Face directory: the config, and the model card."""
TRAIN_A_TOKENIZER = "train"
"""The value of `data.tokenizer` with which a tokenizer is trained on the run's text."""
