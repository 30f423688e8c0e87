"""``vilseg submit``: other ``vilseg`` commands run as jobs on a remote Ray cluster."""
