"""Sweeps: search spaces, trials of the same training as `vilseg train` under Ray Tune, and the report of what they found."""
