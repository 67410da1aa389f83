"""Planners: each answers one paper's question with decisions over a trace; memory.simulate judges all of them alike."""
