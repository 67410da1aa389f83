"""L4: one file a published system: its reference, its claim, what switches it on here, and a run that measures the claim."""
