"""L2: one plan for every tensor (plan), what it costs (trace, capture, simulate), its execution (execute, stores) and the count of bytes (meter)."""
