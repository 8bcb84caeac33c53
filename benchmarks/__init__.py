"""Tables of measured architectures, memory-mapped, and how official files become tables."""
