"""Admission: limits that hold across gateways. `docs/limits.md` says what holds, and what it costs."""

from serve.rate_limits.limiter import Admission, Ticket
from serve.rate_limits.quota_cache import Quota, Standing

__all__ = ["Admission", "Quota", "Standing", "Ticket"]
