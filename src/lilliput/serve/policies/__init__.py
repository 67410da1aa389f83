"""Which tokens stay in the cache."""
