"""Budgets: limits on what a tenant, project or key may spend, and alerts at thresholds."""
