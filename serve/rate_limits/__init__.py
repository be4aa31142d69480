"""Rate limits hold across gateways. `docs/limits.md` says what is guaranteed and what it costs."""

from serve.rate_limits.limiter import Permit, RateLimiter
from serve.rate_limits.quota_cache import Quota, RateLimitStatus

__all__ = ["Permit", "Quota", "RateLimitStatus", "RateLimiter"]
