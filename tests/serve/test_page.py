"""The chat page in a real browser."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from serve.browser import Page, chromium
from serve.small_server import KEY, NAMES, Server, serving
from serve.talking_mixture import save_talking_mixture


@pytest.fixture(scope="module")
def shared_page() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(shared_page: Page, server: Server) -> Iterator[Page]:
    """Opened; at the end nothing was complained about, and nobody else was asked for anything."""
    page = shared_page
    page.window.get_log("performance")
    page.window.get(server.url)
    page.run("localStorage.clear(); sessionStorage.clear()")
    page.window.get(server.url)
    page.wait(lambda: page.find_all("#legend button"))
    yield page
    assert [c for c in page.complaints() if "401" not in c] == []
    own = (server.url, "data:", "about:", "chrome:")
    assert [url for url in page.requested() if not url.startswith(own)] == []
    page.window.get("about:blank")  # an answer that still runs is given up


def text_of_answer(page: Page) -> str:
    answer: str = page.run(
        "return document.querySelector('.assistant:last-child .text').textContent"
    )
    return answer


def ask(page: Page, text: str, max_tokens: int = 12) -> None:
    page.set("max-tokens", max_tokens)
    page.find("#prompt").send_keys(text, Keys.ENTER)
    page.wait(lambda: page.find_all(".assistant"))


def test_an_answer_streams_in_the_colours_of_its_experts(page: Page, server: Server) -> None:
    page.set("seed", 5)
    page.set("temperature", 0.7)
    page.set("top-p", 1)
    ask(page, "the fox")
    page.wait(lambda: not page.is_writing())

    body = {"model": "tiny", "messages": [{"role": "user", "content": "the fox"}], "seed": 5,
            "temperature": 0.7, "max_tokens": 12}  # fmt: skip
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert text_of_answer(page) == choice["message"]["content"]
    spans = page.find_all(".assistant .text span")
    merged = [(s.get_attribute("title"), s.get_attribute("textContent")) for s in spans]
    assert merged == [(s["expert"], s["text"]) for s in choice["pyper"]["spans"]]
    colours = {
        name: s.value_of_css_property("color") for (name, _), s in zip(merged, spans, strict=True)
    }
    assert len(set(colours.values())) == len(colours) >= 2
    note = page.find(".assistant .note").text
    assert re.match(r"12 tokens · \d+ tokens/s · ", note)
    assert "12 tokens" in page.run("return document.getElementById('announce').textContent")


def test_the_bar_and_the_legend_show_the_weights(page: Page) -> None:
    assert [b.text for b in page.find_all("#legend button")] == list(NAMES)
    ask(page, "the fox")
    page.wait(lambda: not page.is_writing())
    whole = page.find("#bar").size["width"]
    page.wait(lambda: abs(sum(p.size["width"] for p in page.find_all("#bar i")) - whole) < 4)
    shares = [re.search(r"(\d+) %", b.text) for b in page.find_all("#legend button")]
    assert 98 <= sum(int(share[1]) for share in shares if share) <= 102


@pytest.mark.parametrize("how", ["escape", "button"])
def test_an_answer_can_be_stopped(page: Page, server: Server, how: str) -> None:
    page.set("temperature", 0)
    ask(page, "the fox", max_tokens=2000)
    page.wait(lambda: len(text_of_answer(page)) > 3)
    if how == "escape":
        page.find("#prompt").send_keys(Keys.ESCAPE)
    else:
        page.find("#stop").click()
    page.wait(lambda: not page.is_writing())
    server.wait_until_idle(seconds=2)
    assert page.find(".assistant .note").text.endswith("stopped")
    assert page.run("return document.activeElement.id") == "prompt"


def test_buttons_that_hide_pass_the_keyboard_on(page: Page) -> None:
    page.set("max-tokens", 2000)
    page.set("temperature", 0)
    page.find("#prompt").send_keys("the fox", Keys.TAB)
    page.window.switch_to.active_element.send_keys(Keys.SPACE)
    page.wait(page.is_writing)
    assert page.run("return document.activeElement.id") == "stop"
    page.window.switch_to.active_element.send_keys(Keys.SPACE)
    page.wait(lambda: not page.is_writing())
    page.set("max-tokens", 12)
    page.find("#prompt").send_keys("the fox", Keys.TAB)
    page.window.switch_to.active_element.send_keys(Keys.SPACE)
    page.wait(lambda: len(page.find_all(".assistant")) == 2 and not page.is_writing())
    assert page.run("return document.activeElement.id") == "prompt"


def test_shift_enter_begins_a_line_and_enter_sends_the_conversation(page: Page) -> None:
    page.find("#prompt").send_keys("a", Keys.SHIFT, Keys.ENTER, Keys.NULL, "b")
    assert page.find("#prompt").get_attribute("value") == "a\nb"
    assert page.find_all("#messages li") == []
    ask(page, "", max_tokens=3)
    page.wait(lambda: not page.is_writing())
    ask(page, "c", max_tokens=3)
    page.wait(lambda: not page.is_writing() and len(page.find_all(".assistant")) == 2)
    roles = page.run("return messages.map((m) => m.role)")
    assert roles == ["user", "assistant", "user", "assistant"]
    assert page.run("return messages[0].content") == "a\nb"
    page.find("#new-chat").click()
    assert page.find_all("#messages li") == []
    assert page.run("return messages") == []


def test_text_of_a_model_is_never_markup(page: Page) -> None:
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>", max_tokens=3)
    page.wait(lambda: not page.is_writing())
    assert page.find(".user .text").text == "<img src=x onerror=alert(1)><b>bold</b>"
    page.run("new Reply().add([{expert: 'law', text: '<b>x</b>', tokens: 1}], {law: 1})")
    assert page.find_all("#messages b, #messages img") == []


def test_a_pinned_expert_writes_in_one_colour(page: Page) -> None:
    page.set("author", "tiny/expert-2")
    ask(page, "the fox")
    page.wait(lambda: not page.is_writing())
    assert [s.get_attribute("title") for s in page.find_all(".assistant .text span")] == [NAMES[2]]


def test_a_refused_message_returns_to_its_field(page: Page) -> None:
    page.run("document.getElementById('temperature').max = 9")
    page.set("temperature", 9)
    page.find("#prompt").send_keys("the fox", Keys.ENTER)
    page.wait(lambda: page.find("#problem").is_displayed())
    assert "temperature" in page.find("#problem").text
    assert page.find("#prompt").get_attribute("value") == "the fox"
    assert page.find_all("#messages li") == []
    page.complaints()  # the browser reports the 400


def test_everything_can_be_reached_and_named(page: Page) -> None:
    unnamed = page.run(
        """
        const named = (e) => e.labels?.length || e.textContent.trim() || e.ariaLabel || e.title;
        return [...document.querySelectorAll("button, input, select, textarea")]
          .filter((e) => !named(e)).map((e) => e.outerHTML);
        """
    )
    assert unnamed == []
    ids = page.run("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert page.find("html").get_attribute("lang") == "en"
    page.find("#theme").click()
    order = set()
    for _ in range(30):
        page.window.switch_to.active_element.send_keys(Keys.TAB)
        order.add(page.run("return document.activeElement.id || document.activeElement.className"))
    assert {
        "prompt",
        "send",
        "author",
        "temperature",
        "seed",
        "system",
        "theme",
        "new-chat",
    } <= order


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page: Page, scheme: str) -> None:
    page.prefer(scheme)
    ask(page, "the fox")
    page.wait(lambda: not page.is_writing())
    paper = rgb(page.find("body").value_of_css_property("background-color"))
    assert (sum(paper) > 380) == (scheme == "light")
    selectors = ".user .text, .note, #keys, #posterior h2, #legend b, label, .quiet, .field p"
    for element in page.find_all(selectors):
        colour = rgb(element.value_of_css_property("color"))
        assert contrast(colour, paper) >= 4.5, element.get_attribute("outerHTML")
    experts = page.run(
        """
        return [...Array(8).keys()].map((i) => {
          const span = document.createElement("span");
          span.className = `e${i}`;
          document.querySelector(".assistant .text").append(span);
          return getComputedStyle(span).color;
        });
        """
    )
    assert len(set(experts)) == 8
    assert min(contrast(rgb(colour), paper) for colour in experts) >= 4.5
    page.prefer("light")


def test_the_theme_can_be_chosen_and_is_kept(page: Page, server: Server) -> None:
    before = page.find("body").value_of_css_property("background-color")
    page.find("#theme").click()
    assert page.find("#theme").get_attribute("aria-pressed") == "true"
    dark = page.find("body").value_of_css_property("background-color")
    assert dark != before
    page.window.get(server.url)
    assert page.find("body").value_of_css_property("background-color") == dark


def test_a_narrow_window_shows_all_of_the_page(page: Page) -> None:
    page.set_size(380, 700)
    try:
        assert page.run("return document.documentElement.scrollWidth") <= 380
        assert not page.find("#settings").is_displayed()
        page.find("#toggle-settings").click()
        assert page.find("#temperature").is_displayed()
        assert page.find("#prompt").is_displayed()
    finally:
        page.set_size(1280, 860)


def test_the_key_is_asked_for(shared_page: Page, hasty_server: Server) -> None:
    page = shared_page
    page.window.get(hasty_server.url)
    page.wait(lambda: page.find("#key").is_displayed())
    assert "API key" in page.find("#problem").text
    page.find("#key").send_keys("wrong", Keys.ENTER)
    page.find("#key").clear()
    page.find("#key").send_keys(KEY, Keys.TAB)
    page.wait(lambda: page.find_all("#legend button"))
    ask(page, "the fox")
    page.wait(lambda: not page.is_writing() and text_of_answer(page))
    page.complaints()
    page.window.get("about:blank")


@pytest.mark.slow
def test_screenshots_for_the_manual(tmp_path: Path) -> None:
    """Eight experts that know a few sentences each; PYPER_SCREENSHOTS=docs keeps the pictures."""
    folder = Path(os.environ.get("PYPER_SCREENSHOTS", tmp_path))
    with serving(save_talking_mixture(tmp_path)) as server:
        for scheme in ("light", "dark"):
            with chromium(1280, 900, dark=scheme == "dark") as page:
                page.window.get(server.url)
                page.wait(lambda: page.find_all("#legend button"))
                page.set("temperature", 0.3)
                page.set("seed", 1)
                for text in ("The harbour lay", "Peel the onions", "def mean(values"):
                    ask(page, text, max_tokens=70)
                    page.wait(lambda: not page.is_writing())
                picture = page.window.get_screenshot_as_png()
                (folder / f"page-{scheme}.png").write_bytes(picture)
                assert len(picture) > 20_000


def rgb(css: str) -> tuple[float, float, float]:
    red, green, blue = (float(x) for x in re.findall(r"[\d.]+", css)[:3])
    return red, green, blue


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """Of WCAG 2.2."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: tuple[float, float, float]) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (x / 255 for x in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
