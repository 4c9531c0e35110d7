"""A target whose every case is a fault, to see that the driver notices each kind."""

import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from smollm_jax.runtime.errors import UserError
from tests.fuzz.worker import SECRET, Attempts

KINDS = (  # in the order of the cases' numbers
    "accepted", "refused", "raises", "hangs", "hangs natively", "ends", "writes outside", "removes outside",
    "writes into a link", "writes beside", "copies a secret", "leaves temporary files", "prints a traceback",
    "refused",
)  # fmt: skip


def fault(kind: str, folder: Path, outside: Path) -> None:
    """Do what no case may do."""
    (folder / "link").symlink_to(outside / "secret.txt")
    does: dict[str, Callable[[], Any]] = {
        "raises": lambda: {}["not there"],
        "hangs": lambda: time.sleep(60),
        "hangs natively": lambda: os.read(os.pipe()[0], 1),
        "ends": lambda: os._exit(3),
        "writes outside": lambda: (outside / "new").write_text("x"),
        "removes outside": (outside / "inner" / "config.json").unlink,
        "writes into a link": lambda: (folder / "link").write_text("x"),
        "writes beside": lambda: Path("new").write_text("x"),
        "copies a secret": lambda: (folder / "copy").write_bytes(b"\0" + SECRET),
        "leaves temporary files": (Path(os.environ["TMPDIR"]) / "left").mkdir,
        "prints a traceback": lambda: print("Traceback (most recent call last):", file=sys.stderr, flush=True),
    }
    if kind == "refused":
        raise UserError("no")
    does.get(kind, lambda: None)()


class Faulty:
    """The sound case is accepted; the others do as their number says."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def case(self, rng: random.Random | None, folder: Path, outside: Path) -> tuple[str, Attempts]:
        if rng is None:
            return "nothing", []
        done = self.base / "home" / "done"
        number = len(done.read_bytes()) if done.exists() else 0
        done.write_bytes(b"x" * (number + 1))
        return KINDS[number], [(KINDS[number], partial(fault, KINDS[number], folder, outside))]

    def close(self) -> None:
        pass


TARGET = Faulty
