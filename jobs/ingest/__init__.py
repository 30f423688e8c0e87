"""Conversion of captioned images to pair shards on a Ray cluster."""
