"""Synthetic scenes with captions and masks, which are the data of the demo and the tests and need no download."""
