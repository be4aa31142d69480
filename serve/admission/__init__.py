"""Admission: limits that hold across gateways. `docs/limits.md` says what holds, and what it costs."""

from serve.admission.gate import Admission, Ticket
from serve.admission.purse import Quota, Standing

__all__ = ["Admission", "Quota", "Standing", "Ticket"]
