"""Clean, deduplicate and tokenize documents with datatrove."""
