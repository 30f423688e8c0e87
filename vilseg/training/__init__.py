"""Training without Ray: the objective and its terms, the training loop, checkpoints, and the files of a run."""
