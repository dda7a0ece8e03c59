"""A cache served over http on loopback, with latency and faults."""

from __future__ import annotations

import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["Server"]


class Server:
    """A file server on loopback. ``faults``: part of a path -> list of what the next requests meet. ``pause_s``: before every
    answer. ``asked``: paths in order. ``most_at_once``: data files under way at the same time. ``watch``: called with every
    request."""

    def __init__(self, root: Path, *, pause_s: float = 0.0) -> None:
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.pause_s, self.most_at_once, self.watch = pause_s, 0, lambda: None
        self.at_once, self.lock = 0, threading.Lock()
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *a: Any) -> None:
                super().__init__(*a, directory=str(root))

            def log_message(self, *a: Any) -> None:
                pass

            def do_GET(self) -> None:
                data_file = "/c/" in self.path or self.path.endswith(".tar")
                with outer.lock:
                    outer.asked.append(self.path)
                    outer.at_once += data_file
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    outer.watch()
                try:
                    time.sleep(outer.pause_s)
                    self.answer()
                finally:
                    with outer.lock:
                        outer.at_once -= data_file

            def answer(self) -> None:
                fault = next((v.pop(0) for k, v in outer.faults.items() if k in self.path and v), None)
                if fault is None:
                    super().do_GET()
                    return
                data = (root / self.path.lstrip("/")).read_bytes()
                if fault in ("500", "503", "404"):
                    self.send_error(int(fault))
                    return
                if fault == "stall":
                    time.sleep(3)
                if fault == "corrupt":
                    data = data[:100] + bytes([data[100] ^ 4]) + data[101:]
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if fault == "short":
                    data = data[: len(data) // 2]
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def data_files(self) -> list[str]:
        """Data files asked for, in order."""
        return [a for a in self.asked if "/c/" in a or a.endswith(".tar")]

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
