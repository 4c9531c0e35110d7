"""Find out whether this process is the kernel of a notebook, and which progress bar can be seen there."""

import sys
from importlib.util import find_spec
from typing import Any


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, such as Jupyter's or Colab's."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def progress_bar() -> Any:
    """Return tqdm's class for a terminal or for a notebook; None where only lines can be read, as in a log."""
    if in_notebook():
        if find_spec("ipywidgets") is None:
            return None
        from tqdm.notebook import tqdm_notebook

        return tqdm_notebook
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm
