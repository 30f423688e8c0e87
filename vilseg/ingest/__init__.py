"""Readers of pairs in users' formats (caption files, sidecars, img2dataset output, Parquet); pair shards are written from them."""
