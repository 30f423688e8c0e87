"""Whole archives of images: what goes in, what comes out, and what keeps two jobs from writing to one place."""
