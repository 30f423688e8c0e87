"""Benchmarks, run by ``python -m benchmarks NAME --json``. ``RESULTS.md`` records measured results."""
