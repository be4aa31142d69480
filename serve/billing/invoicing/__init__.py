"""Invoices: one month of one tenant, from draft to paid, and its documents."""
