"""How good a segmentation is: confusion, mIoU, datasets with masks, reports."""
