"""Connection to Ray, local Ray clusters, the embedded object store, and manifests for clusters on Kubernetes and AWS."""
