"""The ``vilseg`` command line; it imports the other packages, and none of them imports it."""
