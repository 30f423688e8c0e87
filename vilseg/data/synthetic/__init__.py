"""Synthetic captioned scenes: training and evaluation data for the demo and the tests, without a download."""
