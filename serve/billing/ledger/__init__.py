"""The ledger: accounts, transfers, hold, settle and void."""
