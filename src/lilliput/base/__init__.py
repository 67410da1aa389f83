"""L0, no torch: errors, config, registry, ledger, facts, hardware, records, show."""
