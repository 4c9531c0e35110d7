"""Pre-train SmolLM2: `python train_jax.py [--recipe replica|smollm2|quickstart] [overrides]`, or `smollm train`.

The same command again resumes. Exit codes: 0 finished; 2 a mistake in the arguments or the input;
75 stopped on request with everything saved; 1 anything else.
"""

import sys

from smollm_jax.cli.main import train

if __name__ == "__main__":
    train(sys.argv[1:], "train_jax.py")
