"""Class vocabularies, noun phrases of captions, and tokenizers."""
