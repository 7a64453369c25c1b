"""Starts llama-server, waits until it is ready, and runs it until it ends or is to end."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from pyllamarun.errors import DoesNotFit, ServerError

Running = Callable[..., AbstractContextManager["subprocess.Popen[str]"]]

POLL_SECONDS = 0.1
LAST_LINES = 8

# llama.cpp's words when memory runs out: ggml-cuda's and the virtual GPU's allocation, and ggml-alloc's.
_OUT_OF_MEMORY = re.compile(
    r"allocating ([\d.]+) MiB on device \d+: .*out of memory"
    r"|failed to allocate (?:\w+ )?buffer|unable to allocate",
    re.IGNORECASE,
)


def check_port(host: str, port: int) -> None:
    """Raises ServerError when the port is taken: nothing is loaded for a server that cannot be reached."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"{host}:{port} cannot be used.",
                why=error.strerror or str(error),
                remedy=f"Take another port: --port {port + 1}",
            ) from None


def free_port() -> int:
    """A port on loopback that nobody uses at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def is_listening(process: subprocess.Popen[str], port: int) -> bool:
    """Whether *this* process listens on the port; that something answers there says nothing."""
    import psutil

    try:
        connections = psutil.Process(process.pid).net_connections(kind="tcp")
    except (psutil.Error, AttributeError):
        return False
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def is_healthy(host: str, port: int) -> bool:
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{_address(host)}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


class Server:
    """A llama-server that answers; `lines` are the last of its log."""

    def __init__(self, process: subprocess.Popen[str], lines: deque[str], url: str, reader: threading.Thread) -> None:
        self.process, self.lines, self.url, self._reader = process, lines, url, reader

    def failure(self) -> ServerError | DoesNotFit:
        """Why it ended; it has."""
        self._reader.join(timeout=5)
        return failure(self.process.returncode, self.lines)


@contextmanager
def ready_server(
    running: Running,
    argv: Sequence[str],
    environment: Mapping[str, str],
    host: str,
    port: int,
    log: Callable[[str], None],
) -> Iterator[Server]:
    """Starts llama-server and waits until our own answers; raises why, when it ends before.

    `log` gets each line of its log.  There is no time limit for loading: a large model on a slow disk takes many
    minutes, and the log shows it.
    """
    lines: deque[str] = deque(maxlen=200)
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    with running(argv, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        reader = threading.Thread(target=_relay, args=(process, lines, log), daemon=True)
        reader.start()
        server = Server(process, lines, f"http://{_address(reachable)}:{port}", reader)
        while not (is_listening(process, port) and is_healthy(reachable, port)):
            if process.poll() is not None:
                raise server.failure()
            time.sleep(POLL_SECONDS)
        yield server


def serve(
    running: Running,
    argv: Sequence[str],
    environment: Mapping[str, str],
    host: str,
    port: int,
    announce: Callable[[str], None],
    log: Callable[[str], None],
) -> None:
    """Runs llama-server until it ends, which is an error: whoever wants it to end leaves by an exception.

    `announce` gets one line when our own server answers, `log` each line of its log.
    """
    with ready_server(running, argv, environment, host, port, log) as server:
        announce(f"ready: {server.url}")
        server.process.wait()
        raise server.failure()


def _relay(process: subprocess.Popen[str], lines: deque[str], log: Callable[[str], None]) -> None:
    """Drains the server's output whatever becomes of the log: a full pipe would stop the server."""
    assert process.stdout
    listening = True
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if listening:
                try:
                    log(lines[-1])
                except OSError:  # whoever read our stderr is gone
                    listening = False
    except ValueError:  # closed while the server was being stopped
        pass


def _address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def failure(status: int, lines: deque[str]) -> ServerError | DoesNotFit:
    """The error for a program that ended on its own, by what it said last."""
    text = "\n".join(lines)
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    if _OUT_OF_MEMORY.search(text):
        sizes = re.findall(r"allocating ([\d.]+) MiB", text)
        return DoesNotFit(
            f"The GPU's memory ran out{f' when {sizes[-1]} MiB were to be allocated' if sizes else ''}.",
            why="\n".join(list(lines)[-LAST_LINES:]),
            remedy="Free VRAM held by other programs, or give a smaller --vram.",
        )
    return ServerError(f"It ended {how}.", why="\n".join(list(lines)[-LAST_LINES:]), remedy="Run `pyllamarun doctor`.")
