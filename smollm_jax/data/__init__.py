"""Documents to training batches, each with the cursor from which the next one follows; no JAX."""
