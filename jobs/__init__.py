"""Ray jobs over the library, and the ``vilseg`` command (``cli.py``): one file a job."""
