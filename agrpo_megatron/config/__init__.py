"""Settings: how they are read, what they are, and the rules that tie them together."""
