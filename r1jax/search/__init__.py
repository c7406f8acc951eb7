"""Search over the steps of solutions, on the host: trees, beam search, Monte Carlo tree search.

No JAX: a search asks for steps behind beginnings of solutions, and for their values; who samples
and who scores is not its matter. See `r1jax.search.rounds`.
"""
