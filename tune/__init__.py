"""Sweeps: the training of ``vilseg train`` at many points of a search space, under Ray Tune.

``search_space`` says what varies, ``searcher`` chooses the points and ``scheduler`` the trials that go on; ``trial`` trains one
point; ``callbacks`` writes its ``trial_records``; ``sweep`` runs all of it; ``report`` and ``charts`` render the result.
"""
