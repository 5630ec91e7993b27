"""Limited context: exact windowed perplexity, truncation, endless streams, and how well a model uses what it reads."""
