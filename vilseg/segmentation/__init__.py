"""From images and class names to labelled masks."""
