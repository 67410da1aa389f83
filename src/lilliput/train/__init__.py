"""L3: train rooms, blind to each other; reached by name through base.registry."""
