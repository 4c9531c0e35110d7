"""Work inside another program, a notebook say, and leave its process as it was found."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from smollm_jax.config.settings import ComputeConfig
from smollm_jax.runtime.devices import QUIET_LIBTPU, has_accelerator, quiet_libtpu, use_compilation_cache
from smollm_jax.runtime.errors import UserError, one_line
from smollm_jax.runtime.notebook import in_notebook

FLAG = re.compile(r"--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
# settings of JAX that a run or a model makes for its whole process
OF_JAX = ("default_matmul_precision", "compilation_cache_dir", "persistent_cache_min_compile_time_secs")


@contextmanager
def as_found(*, cached: bool = True) -> Iterator[None]:
    """Restore logging, environment and JAX's settings afterwards; a `UserError` names keywords in place of flags.

    In a notebook messages are part of the cell's output: what goes to stderr is shown there as an error. `cached`
    keeps compiled programs in the usual folder unless JAX has one.
    """
    before, root = dict(os.environ), logging.getLogger()
    level, handlers, hook = root.level, root.handlers, sys.unraisablehook
    shown = contextlib.redirect_stderr(sys.stdout) if in_notebook() else contextlib.nullcontext()
    if not has_accelerator():
        quiet_libtpu()
    import jax

    found = {name: getattr(jax.config, f"jax_{name}") for name in OF_JAX}
    root.handlers = []  # logging.basicConfig closes the handlers that it replaces
    try:
        with shown:
            if cached and found["compilation_cache_dir"] is None:
                use_compilation_cache(ComputeConfig().compilation_cache_dir)
            yield
    except UserError as error:
        raise UserError(FLAG.sub(lambda flag: flag[1].replace("-", "_"), one_line(error))) from None
    finally:
        root.handlers, sys.unraisablehook = handlers, hook
        root.setLevel(level)
        for name, value in found.items():
            jax.config.update(f"jax_{name}", value)
        for name in QUIET_LIBTPU.keys() - before.keys():
            os.environ.pop(name, None)
