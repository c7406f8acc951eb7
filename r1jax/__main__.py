"""`python -m r1jax` is the `r1jax` command."""

from r1jax.cli import main

main()
