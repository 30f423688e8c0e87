"""One optimiser step, the loop over any iterable of batches, schedules, and the state of a run."""
