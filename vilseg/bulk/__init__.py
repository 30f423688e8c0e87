"""Bulk segmentation of archives without Ray: listing, scheduling, worker, results table and output lease."""
