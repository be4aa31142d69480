"""Drives the gateway with other projects' own suites, each in an environment that holds nothing of ours."""
