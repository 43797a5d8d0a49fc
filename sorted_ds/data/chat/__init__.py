"""Conversations: read from records, and written as text by the tokenizer's chat template."""
