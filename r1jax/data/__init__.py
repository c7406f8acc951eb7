"""Data on the host: where examples come from, and how they become token ids.

Nothing here imports jax, and transformers is imported only where a tokenizer is made.
"""
