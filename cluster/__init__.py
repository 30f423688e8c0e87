"""Embedded object store, local Ray clusters, the connection to Ray, and manifests for real clusters."""
