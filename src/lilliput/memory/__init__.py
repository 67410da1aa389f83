"""L2: what tensors cost (meter) and what is recomputed (execute), for any nn.Module."""
