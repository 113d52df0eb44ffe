"""The tests of `optax_accum`."""
