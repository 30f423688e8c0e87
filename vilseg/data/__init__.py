"""Pairs on storage, decoding, the order they are trained in, augmented views, and synthetic scenes."""
