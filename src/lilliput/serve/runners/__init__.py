"""How the engine runs a model."""
