"""The browser that tests of pages share, as a fixture."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = next(filter(None, map(shutil.which, BROWSERS)), str(own) if own.is_file() else None)
        if found is None:
            pytest.skip(f"no Chromium is installed (looked for {', '.join(BROWSERS)} and Playwright's own)")
        # Without the first, Chromium does not start for root; without the others it asks for the network by itself.
        switches = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        with playwright.chromium.launch(executable_path=found, args=switches) as browser:
            yield browser
