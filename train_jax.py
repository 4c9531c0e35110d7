"""Pre-train SmolLM2: `python train_jax.py [--recipe replica|smollm2|quickstart] [overrides]`.

The same command again resumes. Exit codes: 0 finished; 2 a mistake in the arguments or the input;
75 stopped on request with everything saved; 1 anything else.
"""

import sys

from smollm_jax.cli.arguments import parse
from smollm_jax.runtime.errors import run_main
from smollm_jax.runtime.signals import StopRequest, leave


def main(stop: StopRequest) -> int:
    config = parse(sys.argv[1:])
    from smollm_jax.training.fit import fit  # JAX only now: --help and mistakes answer at once

    return fit(config, stop)


if __name__ == "__main__":
    with StopRequest() as request:
        leave(run_main(lambda: main(request)))
