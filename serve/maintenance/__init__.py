"""The steward's work: recovery, billing jobs, reconciliation."""
