"""Pair shards on storage, image decoding, the sampler, the batch reader, augmented views, and synthetic scenes."""
