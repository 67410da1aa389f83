"""Where guesses come from (serve/speculative.py says what becomes of them)."""
