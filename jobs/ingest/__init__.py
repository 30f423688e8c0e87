"""Conversion of captioned images to shards of image-caption pairs on a Ray cluster."""
