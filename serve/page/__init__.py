"""Web page of the server, built with Gradio, and the custom HTML element that shows results."""
