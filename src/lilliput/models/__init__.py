"""L2: plain single-device PyTorch models that state their Facts; files in and out."""
