"""Runs Locust's scenarios on a service and checks the bill after each run; see docs/loadtests.md."""
