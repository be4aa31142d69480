"""How long work tells where it is."""

from collections.abc import Callable

OnProgress = Callable[[str, float], None]
"""Told what is being done and the fraction of all work that is done, 0 to 1."""


def silent(stage: str, fraction: float) -> None:
    """Tell nobody."""
