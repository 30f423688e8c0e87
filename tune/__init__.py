"""Sweeps: the training of ``vilseg train`` at many points of a search space, under Ray Tune.

A point of the space is an assignment of values to configuration keys; a trial is the training at a point. ``search_space``
defines the keys that vary, ``searcher`` chooses the points, and ``scheduler`` chooses the trials that continue. ``trial`` trains
one point, and ``callbacks`` writes its ``trial_records``. ``sweep`` runs the whole sweep; ``report`` and ``charts`` render its
result.
"""
