# SPDX-License-Identifier: Apache-2.0

"""Where rows are sent to: a webhook, an MQTT broker. None is lost while the other side is away, or this one is killed.

What was sent is a number of bytes of the journal, kept in a file. A row counts as sent when the other side has said so.
A process that is killed in between sends it again: receivers tell by its name and SHA-256.
"""

import json
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from anomalib_resad.deploy.journal import rows_from
from anomalib_resad.enrollment.files import write_whole

SECONDS = 10.0  # that the other side has for an answer
PAUSE, LONGEST_PAUSE = 0.25, 60.0  # seconds between two looks for rows, and at most after failures

logger = logging.getLogger(__name__)
Sink = Callable[[dict[str, Any]], None]  # raises where the row was not taken


def webhook_sink(url: str) -> Sink:
    """Sends each row as JSON in a POST request.

    Raises:
        ValueError: If it is no address of the web.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        msg = f"--webhook {url}: use an address that begins with http:// or https://."
        raise ValueError(msg)

    def post(row: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(url, json.dumps(row).encode(), headers), timeout=SECONDS):  # noqa: S310  # checked above
            pass

    return post


def mqtt_sink(address: str) -> Sink:
    """Publishes each row as JSON, and waits until the broker has it (quality of service 1).

    Args:
        address (str): ``host:port/topic``.

    Raises:
        ValueError: If it is none, or paho-mqtt is not installed.
    """
    try:
        from paho.mqtt.client import Client  # noqa: PLC0415  # an extra
        from paho.mqtt.enums import CallbackAPIVersion  # noqa: PLC0415
    except ModuleNotFoundError as error:
        msg = "--mqtt needs paho-mqtt: pip install paho-mqtt, or the extra [mqtt]."
        raise ValueError(msg) from error
    server, _, topic = address.partition("/")
    host, _, port = server.rpartition(":")
    if not (host and topic and port.isdecimal() and 0 < int(port) < 65536) or set("#+") & set(topic):
        msg = f"--mqtt {address}: write host:port/topic, such as broker.local:1883/line1/cable."
        raise ValueError(msg)

    def publish(row: dict[str, Any]) -> None:
        client = Client(CallbackAPIVersion.VERSION2)
        client.connect_timeout = SECONDS
        client.connect(host.strip("[]"), int(port))
        client.loop_start()
        try:
            sent = client.publish(topic, json.dumps(row), qos=1)
            sent.wait_for_publish(SECONDS)
            if not sent.is_published():
                msg = f"no answer within {SECONDS:.0f} s"
                raise TimeoutError(msg)
        finally:
            client.disconnect()
            client.loop_stop()

    return publish


class Sender:
    """Sends the rows of a journal in a thread of its own, in their order, and tries again until each one is taken.

    Args:
        name (str): What is sent to, for the file beside the journal, and for messages.
        sink (Sink): Sends one row.
        rows (Path): The journal's file.

    Raises:
        ValueError: If the file that says what was sent is damaged.
    """

    def __init__(self, name: str, sink: Sink, rows: Path) -> None:
        self.name, self.sink, self.rows = name, sink, rows
        self.state = rows.with_name(f".{rows.name}.{name}")
        self._stopped = threading.Event()
        self._sent = self._sent_before()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the row that is being sent; those that are left are sent when it is started again."""
        self._stopped.set()
        self._thread.join(timeout=SECONDS)

    def _sent_before(self) -> int:
        try:
            sent = int(self.state.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            sent = -1
        if not 0 <= sent <= self.rows.stat().st_size:
            msg = f"{self.state} does not belong to {self.rows}. Remove it, and all rows are sent again."
            raise ValueError(msg)
        return sent

    def _run(self) -> None:
        pause, last = PAUSE, ""
        while not self._stopped.wait(pause):
            try:
                self._send()
            except Exception as error:  # noqa: BLE001, PERF203  # whatever a library raises: the row is sent later
                if str(error) != last:
                    logger.warning("%s: a row was not taken, and is sent again later: %s", self.name, error)
                pause, last = min(2 * pause, LONGEST_PAUSE), str(error)
            else:
                pause, last = PAUSE, ""

    def _send(self) -> None:
        with suppress(FileNotFoundError):
            for row, after in rows_from(self.rows, self._sent):
                if self._stopped.is_set():
                    return
                self.sink(row)
                write_whole(self.state, str(after).encode())
                self._sent = after
