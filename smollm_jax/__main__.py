"""The commands beside training: `python -m smollm_jax COMMAND`."""

import signal
import sys

from smollm_jax.cli.commands import main
from smollm_jax.runtime.errors import run_main

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, signal.default_int_handler)  # what Ctrl-C cleans up, they do too
    sys.exit(run_main(main))
