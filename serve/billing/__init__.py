"""Billing: usage events, prices, the ledger and invoices."""
