"""Copies of a state in host memory, which the next train step cannot overwrite."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from smollm_jax.checkpoint.orbax_io import is_on_the_host, leaves_by_name
from smollm_jax.runtime.background import BackgroundTask

if TYPE_CHECKING:
    import numpy as np

COPY_THREADS = 4  # page faults on fresh host memory limit a single copying thread, not the bus


class HostCopies:
    """Host memory for copies, kept from save to save: touching fresh pages takes longer than copying."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}
        self._touching: BackgroundTask[None] | None = None

    def prepare(self, state: Any) -> None:
        """Touch the memory for copies of `state`, arrays or `jax.ShapeDtypeStruct`, in a thread of its own."""
        import numpy as np

        def touch() -> None:
            for name, leaf in shapes.items():
                self._buffers[name] = np.empty(leaf.shape, leaf.dtype)
                self._buffers[name].fill(0)

        shapes = {name: leaf for name, leaf in leaves_by_name(state).items() if is_on_the_host(leaf)}
        self._touching = BackgroundTask(touch)

    def wait(self) -> None:
        """Wait until the memory of `prepare` is ready."""
        if self._touching is not None:
            self._touching.wait()

    def of(self, state: Any) -> dict[str, np.ndarray]:
        """Return the leaves of `state` by name; the next call reuses their memory."""
        import jax
        import numpy as np

        def copy(item: tuple[str, Any]) -> np.ndarray:
            name, leaf = item
            source, buffer = np.asarray(leaf), self._buffers.get(name)
            # on the host, asarray is a view of the very buffer that the next step overwrites
            if not is_on_the_host(leaf):
                return source
            if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
                buffer = self._buffers[name] = np.empty_like(source)
            np.copyto(buffer, source)
            return buffer

        self.wait()
        named = leaves_by_name(state)
        for leaf in named.values():
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        with ThreadPoolExecutor(COPY_THREADS) as pool:
            return dict(zip(named, pool.map(copy, named.items()), strict=True))
