"""What runs beside the library: the embedded object store, local Ray clusters and the manifests for real ones."""
