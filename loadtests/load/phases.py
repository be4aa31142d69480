"""Times the bursts and the flood, in seconds from the start of the run. Imports nothing of Locust."""

PERIOD_S, BURST_S = 15.0, 5.0


def burst_wait_s(at_s: float) -> float:
    """Returns the time until the next burst, 0 in one. Each period ends with its burst."""
    return max(0.0, PERIOD_S - BURST_S - at_s % PERIOD_S)


def flood_begins_s(duration_s: float) -> float:
    """Returns when the flood begins. The first third of the run shows the service without it."""
    return duration_s / 3
