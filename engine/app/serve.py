"""Serving the page: on this machine alone unless asked otherwise, with a queue, and without a word to anyone else."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.app.examples import toy_examples
from engine.app.models import load_models
from engine.config.app import AppArguments
from engine.detector.detector import Detector

logger = logging.getLogger(__name__)

# Of clicks that wait for the model, from all visitors together, and of visitors whose images are kept.
MOST_WAITING, MOST_VISITORS = 32, 32


def serve(arguments: AppArguments) -> None:
    """Load the models and serve the page until a signal comes. Raises `UserError` as `load_models` does."""
    models = load_models(arguments)
    with page_served(models, arguments.host, arguments.port, arguments.domain) as address:
        logger.info("%s: %s. Ctrl-C ends it", address, ", ".join(models))
        if arguments.host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("--host %s: who can reach this machine can use the page, without a password", arguments.host)
        threading.Event().wait()


@contextmanager
def page_served(models: Mapping[str, Detector], host: str, port: int, domain: str = "industrial") -> Iterator[str]:
    """Serve the page while the block runs; gives its address. What visitors drop is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="anomaly_page_") as folder:
        _settle(Path(folder))
        from engine.app.page import CSS, THEME, build_page  # Gradio reads its settings when it is imported

        page = build_page(models, toy_examples(), Path(folder), domain)
        page.queue(max_size=MOST_WAITING, default_concurrency_limit=4, api_open=False)
        from engine.app.dropped import MOST_BYTES

        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                show_error=False,
                max_file_size=MOST_BYTES,
                state_session_capacity=MOST_VISITORS,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                strict_cors=True,
                theme=THEME,
                css_paths=[CSS],
            )
            yield address
        finally:
            page.close(verbose=False)


def _settle(folder: Path) -> None:
    """Take Gradio's settings from nowhere but here: no statistics, no look for newer versions, no other folders."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
