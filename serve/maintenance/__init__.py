"""Maintenance: recovery of dead gateways' requests, periodic jobs, reconciliation; the steward runs them."""
