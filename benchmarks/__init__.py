"""Measurements that others can repeat: ``python -m benchmarks NAME --json``; RESULTS.md keeps what was seen."""
