"""Ray jobs: each distributes one function of the library, which does not import Ray, over a cluster."""
