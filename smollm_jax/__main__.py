"""`python -m smollm_jax COMMAND`, which is also the console command `smollm COMMAND`."""

from smollm_jax.cli.main import console

if __name__ == "__main__":
    console()
