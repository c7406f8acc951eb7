"""The recipe's train loops, and what surrounds them: one file per stage, read top to bottom."""
