"""A trained model in use: completions and likelihoods, an HTTP server, a chat, other harnesses."""
