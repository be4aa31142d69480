"""Budgets: caps on what a tenant, project or key may spend, and the alerts before they are reached."""
