"""A fake Hugging Face Hub on loopback that fails on demand.

It answers what `datasets` and `huggingface_hub` ask in order to find, stream and download files. Each read of
a file's bytes draws a fault from `faults`, a list of (kind, probability), each other answer one from
`api_faults`; of a file whose name does not have `faulty` in it, none. `down` makes it refuse connections.
"""

import json
import random
import socket
import struct
import threading
import time
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
# "drip" is not among them: it sends a byte at a time, 50 a second
KINDS = ("reset", "truncate", "short", "stall", "429", "500", "503", "504")


class Hub:
    """`files` maps a repository, such as "datasets/me/texts", to its files' contents by name."""

    def __init__(self):
        self.files = {}
        self.faults, self.api_faults, self.random = [], [], random.Random(0)
        self.faulty = ""
        self.stall_seconds = 3.0
        self.commit = COMMIT
        self.card = None  # of every dataset
        self.met = {}
        self.ranges = 0
        self._server, self._port = None, 0
        self.start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._port}"

    def start(self):
        hub = self
        handler = type("Handler", (_Handler,), {"hub": hub})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @contextmanager
    def down(self):
        self.stop()
        try:
            yield
        finally:
            self.start()

    def draw_fault(self, faults):
        draw = self.random.random()
        for kind, probability in faults:
            if draw < probability:
                self.met[kind] = self.met.get(kind, 0) + 1
                return kind
            draw -= probability
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would put 40 ms between a head and its body
    hub: Hub

    def log_message(self, *args):
        pass

    def handle(self):
        try:
            super().handle()
        except OSError:  # a client that has given up
            self.close_connection = True

    def do_GET(self):
        if self.hub._server is None:  # a connection kept alive from before it went away
            self.close_connection = True
            return
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "api":
            self.answer_api(parts[1:], parse_qs(url.query))
            return
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        repo, name = "/".join([kind, *parts[:2]]), "/".join(parts[4:])
        if repo not in self.hub.files:
            self.missing("RepoNotFound")
        elif name not in self.hub.files[repo]:
            self.missing("EntryNotFound")
        else:
            self.send_file(self.hub.files[repo][name])

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        files = self.hub.files.get("/".join(urlsplit(self.path).path.split("/")[2:5]), {})
        self.send_json([_entry(name, files[name]) for name in asked if name in files])

    def answer_api(self, parts, query):
        repo, rest = "/".join(parts[:3]), parts[3:]
        files = self.hub.files.get(repo)
        fault = self.hub.draw_fault(self.hub.api_faults)
        if fault == "reset":
            self.close_connection = True
        elif fault:
            self.send_json({"error": "a fault on demand"}, int(fault))
        elif files is None:
            self.missing("RepoNotFound")
        elif rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            below = {name: content for name, content in files.items() if name.startswith(folder)}
            deep = query.get("recursive", ["false"])[0].lower() == "true"
            direct = {n: c for n, c in below.items() if deep or "/" not in n[len(folder) :]}
            folders = {folder + n[len(folder) :].split("/")[0] for n in below if "/" in n[len(folder) :]}
            listed = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in sorted(folders)]
            self.send_json(listed + [_entry(name, content) for name, content in sorted(direct.items())])
        else:
            siblings = [{"rfilename": name} for name in sorted(files)]
            about = {"sha": self.hub.commit, "tags": [], "cardData": self.hub.card}
            self.send_json({"id": "/".join(parts[1:3]), "siblings": siblings, **about})

    def send_file(self, content):
        first, last, code = 0, len(content) - 1, 200
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if asked:
            self.hub.ranges += 1
            begin, _, end = asked.partition("-")
            first, last, code = int(begin), min(int(end or last), last), 206
        part = content[first : last + 1]
        safe = self.command == "HEAD" or self.hub.faulty not in self.path
        fault = None if safe else self.hub.draw_fault(self.hub.faults)
        if fault and fault.isdigit():
            self.send_json({"error": "a fault on demand"}, int(fault), {"Retry-After": "0"})
            return
        if fault == "short":  # a consistent answer, but of half the bytes
            last, part = first + len(part) // 2 - 1, part[: len(part) // 2]
        headers = (
            {"Content-Range": f"bytes {first}-{last}/{len(content)}"} if code == 206 and fault != "short" else {}
        )
        etag = f'"{sha256(content).hexdigest()}"'
        self.send_headers(code, len(part), {"ETag": etag, "X-Repo-Commit": self.hub.commit, **headers})
        if self.command == "HEAD":
            return
        if fault in ("reset", "truncate", "stall"):
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "stall":
                time.sleep(self.hub.stall_seconds)
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return
        step = 1 if fault == "drip" else len(part) or 1
        for at in range(0, len(part), step):
            self.wfile.write(part[at : at + step])
            time.sleep(0.02 if fault == "drip" else 0)

    def send_headers(self, code, length, headers):
        self.send_response(code)
        for name, value in {"Content-Length": length, "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send_json(self, value, code=200, headers=None):
        body = json.dumps(value).encode()
        self.send_headers(code, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what):
        self.send_json({"error": what}, 404, {"X-Error-Code": what})


def _entry(name, content):
    entry = {"type": "file", "oid": sha256(content).hexdigest()[:40], "size": len(content), "path": name}
    if name.endswith(".parquet"):
        entry["lfs"] = {"oid": sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
