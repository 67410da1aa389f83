"""L1: kernels and codecs, each beside its plain-torch reference."""
