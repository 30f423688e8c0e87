"""The ``vilseg`` command line; imports everything else and is imported by nothing."""
