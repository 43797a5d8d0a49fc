"""Text to tokens on disk: files, split, tokenizer, shards of ids, each under a key of its content."""
