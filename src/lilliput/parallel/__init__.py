"""L2: the rig and its assembly in one fixed order."""
