"""When a scenario's users do what, in seconds from the start of the run. Knows nothing of Locust."""

PERIOD_S, BURST_S = 15.0, 5.0


def burst_wait_s(at_s: float) -> float:
    """How long until the next burst; 0 in one. Each period ends with its burst."""
    return max(0.0, PERIOD_S - BURST_S - at_s % PERIOD_S)


def flood_begins_s(duration_s: float) -> float:
    """A third of the run shows how things are without it."""
    return duration_s / 3
