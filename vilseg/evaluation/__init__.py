"""Evaluation of segmentations: metrics, datasets with ground-truth masks, reports."""
