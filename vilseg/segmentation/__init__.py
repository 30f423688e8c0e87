"""Segment images, GeoTIFFs and videos into regions of named classes.

:class:`vilseg.segmentation.segmenter.Segmenter` computes the masks of an image; `geotiff` and `video` use it for
windows and frames.
"""
