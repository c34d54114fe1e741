"""Headless Chromium, where the system has one."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait


@contextmanager
def chromium(width: int = 1280, height: int = 860, *, dark: bool = False) -> Iterator["Page"]:
    """A browser window; the test is skipped where Chromium or its driver is missing."""
    browser = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip(
            "needs chromium and chromium-driver: `apt-get install chromium chromium-driver`"
        )
    options = Options()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--window-size={width},{height}", "--hide-scrollbars"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        page = Page(window)
        page.set_size(width, height)
        page.prefer("dark" if dark else "light")
        yield page
    finally:
        window.quit()


class Page:
    """What the tests do with a page."""

    def __init__(self, window: webdriver.Chrome) -> None:
        self.window = window

    def set_size(self, width: int, height: int) -> None:
        self.window.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> Any:
        return self.window.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector: str) -> list[Any]:
        return self.window.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.window.execute_script(script, *arguments)

    def wait(self, condition: Any, seconds: float = 15) -> Any:
        return WebDriverWait(self.window, seconds, 0.02).until(lambda _: condition())

    def set(self, element_id: str, value: object) -> None:
        """As if the user had chosen it."""
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));",
            element_id,
            str(value),
        )

    def is_writing(self) -> bool:
        return bool(self.find("#stop").is_displayed())

    def complaints(self) -> list[str]:
        """What the browser's console holds: broken scripts, blocked or failed requests."""
        return [entry["message"] for entry in self.window.get_log("browser")]

    def requested(self) -> list[str]:
        """Every URL that was asked for since the last time."""
        import json

        messages = [json.loads(e["message"])["message"] for e in self.window.get_log("performance")]
        return [
            m["params"]["request"]["url"]
            for m in messages
            if m["method"] == "Network.requestWillBeSent"
        ]
