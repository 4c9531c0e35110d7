"""Run the command line: flags to settings, and the commands of `python -m smollm_jax`."""
