"""The Gradio page and the viewer that it shows results in."""
