"""L2: tokenizers, packed text, conversations, calibration."""
