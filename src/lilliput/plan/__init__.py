"""L4: arithmetic over ledgers; no torch."""
