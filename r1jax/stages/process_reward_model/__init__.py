"""Process reward model training."""
