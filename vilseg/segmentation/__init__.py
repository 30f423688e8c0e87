"""Segment images, GeoTIFFs and videos into regions of named classes.

:class:`vilseg.segmentation.segmenter.Segmenter` holds the one way from an image to masks; `geotiff` and `video` build on it.
"""
