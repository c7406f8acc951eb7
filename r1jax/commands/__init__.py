"""What each command of `r1jax` does; `r1jax/cli.py` makes one program of them.

A command is a function, and its parameters are its arguments and options. Imports are inside the
functions, so that `--help` and a mistake in a config do not wait for JAX.
"""
