"""Invoicing: bills one month of one tenant, from draft to paid, and writes its documents."""
