"""Benchmarks our server, alone and beside its peers; docs/performance.md has the results."""
