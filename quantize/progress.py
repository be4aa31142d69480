"""Callbacks by which long work reports its progress."""

from collections.abc import Callable

OnProgress = Callable[[str, float], None]
"""Receives the name of the current stage and the fraction of all work that is done, 0 to 1."""


def silent(stage: str, fraction: float) -> None:
    """Ignores the progress: the default where nobody watches."""
