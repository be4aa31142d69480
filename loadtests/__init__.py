"""Loads the service (`load`, docs/loadtests.md) and benchmarks it (`bench`, docs/performance.md)."""
