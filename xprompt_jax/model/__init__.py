"""The networks: decoder, XP tokens, cache, image tokenizer."""
