"""Bulk segmentation on a Ray cluster."""
