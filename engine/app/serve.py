"""Serve the page: by default on this machine only, with a queue, and without requests to other servers."""

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.app.examples import toy_examples
from engine.app.models import load_models
from engine.app.uploads import MAX_BYTES
from engine.config.tools import AppArguments
from engine.detector.detector import Detector
from utils.errors import UserError

logger = logging.getLogger(__name__)

# Requests that wait for the model, of all visitors, and visitors whose images are kept.
MAX_WAITING, MAX_VISITORS = 32, 32


def serve(arguments: AppArguments) -> None:
    """Load the models and serve the page until a signal. Raises `UserError` as `load_models` does."""
    check_address(arguments.host, arguments.port)
    models = load_models(arguments)
    with page_served(models, arguments.host, arguments.port, arguments.domain, arguments.root_path) as address:
        logger.info("%s: %s. Press Ctrl-C to stop", address, ", ".join(models))
        if arguments.host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("--host %s: everyone who can reach this machine can use the page", arguments.host)
        threading.Event().wait()


@contextmanager
def page_served(
    models: Mapping[str, Detector], host: str, port: int, domain: str = "industrial", root_path: str | None = None
) -> Iterator[str]:
    """Serve the page in a context, and yield its address. Uploads are deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="anomaly_page_") as folder:
        _configure_gradio(Path(folder))
        from engine.app.page import CSS, THEME, build_page  # Gradio reads its settings at import

        page = build_page(models, toy_examples(), Path(folder), domain)
        page.queue(max_size=MAX_WAITING, default_concurrency_limit=4, api_open=False)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                root_path=root_path,
                max_file_size=MAX_BYTES,
                state_session_capacity=MAX_VISITORS,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                theme=THEME,
                css_paths=[CSS],
            )
            yield address
        finally:
            page.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Raise `UserError` for an address that this machine does not have, or on which another program listens."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: this machine has no such address; 127.0.0.1 is this machine alone") from None
    with socket.socket(family, kind) as listener:
        if os.name != "nt":
            # A port that was in use a moment ago is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"--host {host} --port {port}: cannot listen there ({reason}); give another --port"
            ) from None


def _configure_gradio(folder: Path) -> None:
    """Ignore Gradio's environment variables and proxies; switch off its analytics, and set its upload folder.

    Gradio sends its only requests to the page itself, which a proxy cannot reach.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"no_proxy": "*", "NO_PROXY": "*"}
