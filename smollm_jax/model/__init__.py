"""The transformer and its loss in plain JAX. It knows no mesh, no kernel and no Hugging Face name."""
