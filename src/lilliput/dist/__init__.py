"""L1: tiers and the links between them."""
