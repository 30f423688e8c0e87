"""Readers of image-caption pairs in users' formats: caption files, sidecars, img2dataset output and Parquet."""
