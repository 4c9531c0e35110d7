"""Find out whether this process is the kernel of a notebook, and which progress bar can be seen there."""

import os
import sys
from importlib.util import find_spec
from typing import Any


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, such as Jupyter's or Colab's."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _columns() -> int:
    """Return the width of the terminal. It is 0 in some containers, where no bar would be seen."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return 80  # not a terminal of the system, but one to its program


def progress_bar() -> Any:
    """Return tqdm's class for a terminal or for a notebook; None where only lines can be read, as in a log."""
    if in_notebook():
        if find_spec("ipywidgets") is None:
            return None
        from tqdm.notebook import tqdm_notebook

        return tqdm_notebook
    if not sys.stderr.isatty() or not _columns():
        return None
    from tqdm import tqdm

    return tqdm
