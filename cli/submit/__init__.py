"""``vilseg submit``: any verb as a job of a remote Ray cluster."""
