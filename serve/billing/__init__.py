"""What was used, what it costs, who owes it: usage events, prices, the ledger, invoices."""
