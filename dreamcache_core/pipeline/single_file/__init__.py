"""What a single-file checkpoint lacks: configurations and the tokenizer."""
