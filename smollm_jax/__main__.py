"""The commands beside training: `python -m smollm_jax COMMAND`."""

import sys

from smollm_jax.cli.commands import main
from smollm_jax.runtime.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
