"""Give a local server a public address through Gradio's tunnel while the server runs.

Gradio's share server names the address and forwards requests. The program frpc connects to the share server.
Gradio downloads frpc from Hugging Face and checks its hash. The page may be any app: the tunnel knows only a port.
"""

import secrets
from typing import Any
from urllib.parse import urlsplit

from smollm_jax.runtime.background import BackgroundTask
from smollm_jax.runtime.errors import one_line, say
from smollm_jax.serving.guard import Hosts

SECONDS = 90.0  # for the share server, a download of 13 MB, and the connection
USER = "smollm"


def for_all(user: str, password: str) -> tuple[str, str]:
    """Return user and password for a public page. Without `user`, makes new ones and prints them."""
    if not user:
        user, password = USER, secrets.token_urlsafe(12)
        say(f"share: log in as {user} with the password {password}")
    return user, password


class Share:
    """A tunnel to `host`:`port` that opens in the background. If it cannot open, a line reports the reason.

    The server answers under the tunnel's name as soon as `hosts` has the name.
    """

    def __init__(self, host: str, port: int, hosts: Hosts):
        self.url: str | None = None
        self._host, self._port, self._hosts = host, port, hosts
        self._tunnel: Any = None
        self._before: list[Any] | None = None
        self._closed = False
        self._task = BackgroundTask(self._open)

    def wait(self) -> str | None:
        """Wait until the tunnel is open and return its URL. None if it could not be opened."""
        self._task.wait(SECONDS)
        return self.url

    def close(self) -> None:
        self._closed = True
        self._tunnel = self._tunnel or self._newest()  # it may still be opening
        process = getattr(self._tunnel, "proc", None)
        if process is not None:
            self._tunnel.proc = None  # else Gradio ends it again at exit, and prints a line
            process.terminate()
            process.wait()

    def _open(self) -> None:
        attempt = BackgroundTask(self._connect)  # it waits forever for a program that prints nothing
        try:
            address = attempt.result(SECONDS)
        except BaseException as error:  # any error: network, download, certificate, program
            self.close()
            reason = one_line(error.__cause__ or error)
            say(f"no public address: {reason}; the page stays open to this machine")
            return
        if self._closed:
            return self.close()
        self._hosts.shared.add(str(urlsplit(address).hostname))
        self.url = address
        print(f"{address} (public, until the server ends)", flush=True)

    def _connect(self) -> str:
        from gradio import networking, tunneling

        # the default is below the current folder
        networking.CERTIFICATE_PATH = str(tunneling.BINARY_FOLDER / "certificate.pem")
        self._before = list(tunneling.CURRENT_TUNNELS)
        try:
            return networking.setup_tunnel(self._host, self._port, secrets.token_urlsafe(32), None, None)
        finally:
            self._tunnel = self._newest()

    def _newest(self) -> Any:
        """Return the tunnel that Gradio has opened for this server, or None."""
        if self._before is None:
            return None
        from gradio.tunneling import CURRENT_TUNNELS

        return next((one for one in CURRENT_TUNNELS if one not in self._before), None)
