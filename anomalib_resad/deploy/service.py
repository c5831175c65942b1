# SPDX-License-Identifier: Apache-2.0

"""The server's process: its socket, its token, and its end. The page is a part that can be left out."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir

import uvicorn
from fastapi import FastAPI

from anomalib_resad.deploy import api
from anomalib_resad.deploy.guard import EVERYWHERE, checked_token
from anomalib_resad.deploy.inferencer import ResADInferencer
from anomalib_resad.deploy.turns import WAIT_SECONDS, Turns
from anomalib_resad.deploy.uploads import own_folder

PORTS = range(7860, 7960)
STOP_SECONDS = WAIT_SECONDS + 5  # so that all that wait for the model when the process is to end get an answer
REST_SECONDS = 3  # for answers that are being sent; a page that is open in a browser never lets go of its connection


class _Server(uvicorn.Server):
    """Lets the requests that it holds end before it closes their connections."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=REST_SECONDS)
        )
        self._turns: Turns = app.state.turns

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, after SIGTERM or Ctrl+C; a second signal ends the waiting."""
        self._turns.close()
        for each in self.servers:
            each.close()  # nobody can connect any more
        end = time.monotonic() + STOP_SECONDS
        while self._turns.inside and not self.force_exit and time.monotonic() < end:  # noqa: ASYNC110  # threads tell it
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def launch(
    inferencer: ResADInferencer,
    say: Callable[[str], object],
    host: str,
    port: int | None,
    allowed_hosts: Sequence[str],
    token: str | None,
    max_upload_mb: int,
    max_total_mb: int,
    page: bool = True,
) -> None:
    """Serve the API, and the page, until it is interrupted.

    Args:
        inferencer (ResADInferencer): The model and its products.
        say (Callable[[str], object]): Prints a line.
        host (str): Address to listen on.
        port (int | None): Port; ``None`` for the first free one.
        allowed_hosts (Sequence[str]): Further names under which the page is opened.
        token (str | None): What clients must know; ``None`` makes one where others can reach the page.
        max_upload_mb (int): Largest file.
        max_total_mb (int): Largest request.
        page (bool): Serve the page, too, which needs Gradio.

    Raises:
        ValueError: If an argument is impossible.
        OSError: If the port is taken.
    """
    needed = checked_token(host, token)
    if port is not None and not (type(port) is int and 0 <= port < 65536):
        msg = (
            f"port={port!r} must lie between 0 and 65535; without one, the first free one from {PORTS[0]} on is taken."
        )
        raise ValueError(msg)
    parent = Path(os.environ.get("GRADIO_TEMP_DIR") or gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    with own_folder(parent) as folder, _listening(host, port) as listening:
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
        app = _maker(page)(inferencer, host, allowed_hosts, needed, max_upload_mb, max_total_mb, folder)
        name = "localhost" if host in EVERYWHERE else (f"[{host}]" if ":" in host else host)
        say(f"{'The page' if page else 'The API'}: http://{name}:{listening.getsockname()[1]} (Ctrl+C ends it)")
        if host in EVERYWHERE and not allowed_hosts:
            say("It is served as localhost alone; name the other addresses that it is opened under: --allowed_hosts.")
        if needed is not None and token is None:
            say(f"It asks for a password, which is this token, of any user: {needed}")
        with suppress(KeyboardInterrupt):
            _Server(app).run([listening])


def _maker(page: bool) -> Callable[..., FastAPI]:
    if not page:
        return api.application
    from anomalib_resad.deploy.serve import application  # noqa: PLC0415  # needs Gradio

    return application


def _listening(host: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for each in PORTS if port is None else [port]:
        with suppress(OSError):
            listening = socket.create_server((host.strip("[]"), each), family=family)
            # Inherited by connections, for which asyncio sets it only if their socket names TCP, which this one does
            # not. Else an answer's second part waits 40 ms until the client has acknowledged the first.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listening
    msg = f"{host}, port {port or f'{PORTS[0]} to {PORTS[-1]}'}: it is taken, or not of this machine. Pass another one."
    raise OSError(msg)
