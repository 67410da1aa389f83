"""L4: the loops; they name no technique."""
