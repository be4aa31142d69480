"""The type of the fixture `new_database`, and the mark for tests that need SQLite alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

NewDatabase = Callable[[], AbstractContextManager[str]]

# For tests of what only SQLite does, and for those in which the store's dialect plays no part.
on_sqlite = pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
