# SPDX-License-Identifier: Apache-2.0

"""`resad serve`: the web page."""

import os
from pathlib import Path

from anomalib_resad.commands.console import say
from anomalib_resad.deploy.inferencer import ResADInferencer


def serve(
    bundle: Path,
    banks: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed_hosts: list[str] | str | None = None,
    token: str | None = None,
    max_upload_mb: int = 30,
    max_total_mb: int = 200,
    page: bool = True,
    streams: int = 1,
) -> None:
    """Open a web page to enroll products and inspect photos, and a REST API beside it.

    Args:
        bundle: Folder made by `resad export`, or file made by `resad bundle pack`.
        banks: Folder of the products' banks, if not in the bundle.
        host: Address to listen on; by default this machine alone can open the page.
        port: Port; by default the first free one from 7860 on.
        allowed_hosts: Further names under which the page is opened, separated by commas: that of a proxy, or of this
            machine. Requests under other names are refused.
        token: What a visitor must give as password (of any user), or a client as bearer token. By default that in
            RESAD_TOKEN; where others can reach the page, one is made and printed.
        max_upload_mb: Largest file that is accepted.
        max_total_mb: Largest request, of up to 20 files.
        page: Serve the page; without it the API alone, which does not need Gradio.
        streams: Photos that are computed at the same time, for machines with many cores: waits of several clients are
            more even, and a single one waits longer.
    """
    hosts = allowed_hosts.split(",") if isinstance(allowed_hosts, str) else (allowed_hosts or [])
    token = token or os.environ.get("RESAD_TOKEN")
    try:
        from anomalib_resad.deploy.service import launch  # noqa: PLC0415  # an extra

        inferencer = ResADInferencer(bundle, banks=banks, streams=streams)
        launch(inferencer, say, host, port, hosts, token, max_upload_mb, max_total_mb, page)
    except ModuleNotFoundError as error:
        extra = "serve] for the page, [api" if page else "api"
        msg = f"The server needs {error.name}: install the extra [{extra}]" + (" for --page false." if page else ".")
        raise ValueError(msg) from error
