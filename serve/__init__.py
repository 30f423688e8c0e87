"""The deployment: Ray Serve replicas of the model behind an HTTP API and a Gradio page."""
