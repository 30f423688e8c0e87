"""Evaluation of segmentations: confusion matrix, mIoU, datasets with masks, reports."""
