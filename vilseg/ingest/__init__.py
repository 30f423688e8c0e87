"""Pairs as users have them (caption files, sidecars, img2dataset output, Parquet), read for conversion to pair shards."""
