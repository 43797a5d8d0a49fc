"""Prepares text as tokens on disk: finds files, splits documents, trains or loads a tokenizer, encodes."""
