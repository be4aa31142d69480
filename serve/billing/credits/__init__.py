"""Credits: prepaid grants and their expiry, and charges that are not requests."""
