"""Ray jobs: each connects one function of the library, which knows nothing of Ray, to a cluster."""
