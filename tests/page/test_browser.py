"""report.html in a real browser, at 60 and at 10,000 photos: `make test-page`."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("ESOL_PAGE"), reason="needs Chromium: make test-page")
SWITCHES = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"


@contextlib.contextmanager
def chromium(**preferences: int) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for switch in (*SWITCHES.split(), "disable-component-update", "window-size=1300,1000"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.add_experimental_option("prefs", preferences)
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def wait(browser: Any, script: str, what: str) -> Any:
    """The first answer of a script that is true, within ten seconds."""
    for _ in range(200):
        if found := browser.execute_script(f"return {script}"):
            return found
        time.sleep(0.05)
    raise AssertionError(f"ten seconds without {what}")


PAINTED = (  # whether a canvas holds a pixel of this colour, nearly
    "[...document.querySelectorAll(SELECTOR)].some(c => c.width && "
    "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].some((v, p, all) => p % 4 === 0 && TEST))"
)
RED = "all[p] > all[p + 1] * 2 + 40 && all[p] > all[p + 2] * 2 + 40"


def painted(selector: str, test: str = "all[p] + all[p + 1] + all[p + 2] > 0") -> str:
    return PAINTED.replace("SELECTOR", json.dumps(selector)).replace("TEST", test)


@pytest.mark.parametrize("count", [60, 10_000])
def test_open_sort_switch_slide_enlarge(browser: Any, tmp_path: Path, count: int) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    command = [sys.executable, str(ROOT / "tests/page/fake_run.py"), str(tmp_path / "made"), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    wrote = json.loads(done.stdout)
    page = tmp_path / "made/run/report.html"
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert ("report_files" in text) == (count > 500)
    if count == 10_000:
        assert wrote["peak"] - wrote["before"] < 500
        assert wrote["page"] < 60

    begun = time.monotonic()
    browser.get(page.as_uri())
    wait(browser, painted(".cell canvas"), "a painted photo")
    assert time.monotonic() - begun < 3
    cells = browser.execute_script("return document.querySelectorAll('.cell').length")
    assert 0 < cells <= 60  # only what is to be seen, however many there are
    assert browser.execute_script("return ESOL.order().length") == count

    def names() -> list[str]:
        return browser.execute_script(
            "return [...document.querySelectorAll('.cell p:nth-of-type(1)')].map(p => p.title)"
        )

    worst = names()
    browser.execute_script(
        "const o = document.getElementById('order'); o.value = 'name'; o.dispatchEvent(new Event('change'))"
    )
    assert names()[:3] == ["photo00000", "photo00001", "photo00002"] != worst[:3]

    buttons = browser.find_elements(By.CSS_SELECTOR, "#layers button")
    assert [b.text for b in buttons] == ["photo", "cam", "expand", "seed_masks", "psa_masks", "truth"]
    buttons[5].click()
    wait(browser, painted(".cell canvas", RED), "a red mask")
    browser.execute_script(
        "const t = document.getElementById('threshold'); t.value = 100; t.dispatchEvent(new Event('input'))"
    )
    wait(browser, f"!{painted('.cell canvas', RED)}", "seeds that a threshold of 1 has emptied")
    assert browser.find_element(By.CSS_SELECTOR, "#layers [aria-pressed=true]").text == "expand"

    browser.find_element(By.ID, "grid").send_keys(Keys.ARROW_RIGHT, Keys.ENTER)
    assert browser.find_element(By.ID, "caption").text == "photo00001 · dog & <b>cow</b>"
    wait(browser, painted("#views figure:last-child canvas"), "the truth of a large photo")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    wait(browser, "document.getElementById('caption').textContent.startsWith('photo00002')", "the next photo")
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    browser.find_element(By.CSS_SELECTOR, "#legend button").click()
    wait(browser, f"ESOL.order().length < {count} / 2 + 1", "the photos of one class alone")
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


def test_without_javascript_the_page_still_shows_pictures(tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    command = [sys.executable, str(ROOT / "tests/page/fake_run.py"), str(tmp_path / "made"), "20"]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    with chromium(**{"profile.managed_default_content_settings.javascript": 2}) as browser:
        browser.get((tmp_path / "made/run/report.html").as_uri())
        assert "The gallery needs JavaScript" in browser.find_element(By.ID, "gallery").text
        assert not browser.find_element(By.ID, "grid").is_displayed()
        pictures = browser.find_elements(By.CSS_SELECTOR, "#pictures img")
        assert pictures
        assert all(picture.size["width"] > 300 for picture in pictures)
