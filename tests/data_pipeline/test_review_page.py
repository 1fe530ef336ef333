"""The page in a real browser: by keyboard alone, with hostile records, dark and light, narrow and wide."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import decisions, review
from data_pipeline.decisions import Decision
from data_pipeline.reviewing.server import Server
from fundus_jax.records import Claim, Findings, Passage, Trace, text_sha256
from tests.data_pipeline import browser, reviews
from tests.data_pipeline.browser import Browser
from tests.data_pipeline.reviews import BAD, GOOD, Made, case

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="there is no chromium on this machine")
SWAPPED = GOOD.replace("microaneurysms and haemorrhages", "haemorrhages and microaneurysms")
# Whatever of this ran or was loaded would say so: in `hit`, or as a request or a complaint of the console.
HOSTILE = (
    "</script><script>window.hit=1</script><img src=x onerror=window.hit=2><svg onload=window.hit=3>"
    "\"'><b id=mark>{{start}}{{script}}</b><!-- &lt;i&gt; javascript:window.hit=4 ${window.hit=5} "
    "\u202edrusen"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of this file."""
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[object]:
    """A function that serves cases to anna, until the test ends."""
    servers: list[Server] = []

    def start(cases: list[Made], **options: object) -> Server:
        reviews.make(tmp_path / "data", cases, **options)  # type: ignore[arg-type]
        servers.append(review.start(tmp_path / "data", tmp_path / "decisions", "anna", 0))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1]

    yield start
    for one in servers:
        one.shutdown()
        one.server_close()
        one.desk.ledger.close()


def opened(page: Browser, server: Server) -> Browser:
    """The page of a server, with nothing noted yet."""
    page.problems.clear()
    page.requests.clear()
    page.size(1200, 860)
    page.open(server.address)
    page.until("document.querySelector('.frame img').complete")
    return page


def at(page: Browser, number: int) -> None:
    """Wait until case `number` is on the screen."""
    page.until(f"document.querySelector('.where')?.innerText.includes('made/{number} ')")


def standing(folder: Path) -> dict[str, Decision]:
    """Example -> what anna's file says of it."""
    return {name: found[0] for name, found in decisions.read([folder / "decisions" / "anna.jsonl"]).items()}


def test_a_session_by_keyboard(chromium: Browser, serve, tmp_path: Path) -> None:
    cases = [case(number) for number in range(5)]
    cases[1] = case(1, BAD, ("absent finding claimed: drusen",))
    page = opened(chromium, serve(cases))
    at(page, 0)
    assert page.text("#count") == "0 of 5 decided"
    page.press("a")
    at(page, 1)
    assert standing(tmp_path)["made/0"].outcome == "accept"
    page.until("document.querySelector('#told').innerText === 'Accepted. U takes it back.'")
    page.press("r")
    page.press("Enter")
    assert page.text("#reject-fault") == "Choose a reason: 1 to 8."
    page.press("1")
    page.type("no <b>drusen</b> here")
    page.press("Enter")
    at(page, 2)
    assert standing(tmp_path)["made/1"].reason == "finding is not there: no <b>drusen</b> here"
    page.press("ArrowLeft")
    at(page, 1)
    assert "You rejected this: finding is not there: no <b>drusen</b> here" in page.text(".decided")
    page.press("n")
    at(page, 2)
    page.press("c")
    page.until("document.querySelector('#check').innerText.includes('lets it pass')")
    page.value("document.querySelector('#think').select()")
    page.type(BAD)
    page.until("document.querySelector('#check').innerText.includes('absent finding claimed: drusen')")
    page.press("Enter", ctrl=True)
    page.until("!busy")
    assert "would not let it pass" in page.text("#check")
    assert "made/2" not in standing(tmp_path), "what fails the check is not taken"
    page.value("document.querySelector('#think').select()")
    page.type(SWAPPED)
    page.press("Enter", ctrl=True)
    at(page, 3)
    assert standing(tmp_path)["made/2"].think == SWAPPED
    assert page.text("#count") == "3 of 5 decided"
    page.press("u")
    at(page, 2)
    page.press("u")
    at(page, 1)
    assert standing(tmp_path).keys() == {"made/0"}
    assert page.text("#count") == "1 of 5 decided"
    assert page.problems == []


def test_the_ends_and_a_panel_that_is_left(chromium: Browser, serve, tmp_path: Path) -> None:
    page = opened(chromium, serve([case(0), case(1)]))
    page.press("p")
    page.until("document.querySelector('#told').innerText === 'This is the first one.'")
    for key in ("r", "c", "?"):
        page.press(key)
        page.until("document.querySelector('dialog[open]') !== null")
        page.press("Escape")
        page.until("document.querySelector('dialog[open]') === null")
    assert standing(tmp_path) == {}
    marked = "document.querySelector('mark.quote')"
    assert page.value(f"[{marked}.innerText, {marked}.title]") == [
        "more than microaneurysms",
        "requires: haemorrhage; requires: microaneurysm",
    ]
    page.press("ArrowRight")
    at(page, 1)
    page.press("a")
    page.until("document.querySelector('.decided') !== null")
    assert "You accepted this" in page.text(".decided"), "the last one stays, with its decision"
    page.press("b")
    page.until("getComputedStyle(document.querySelector('.frame svg')).opacity === '0'")
    page.press("z")
    assert page.value("document.querySelector('.frame div').style.transform") == "scale(3)"
    page.open(f"http://127.0.0.1:{page.value('location.port')}/")
    at(page, 0)  # the first that is open, in a new session of the page
    assert page.problems == []


def test_filters_by_keyboard(chromium: Browser, serve, tmp_path: Path) -> None:
    cases = [case(number) for number in range(3)]
    cases[2] = case(2, BAD, ("absent finding claimed: drusen",))
    page = opened(chromium, serve(cases))
    page.press("f")
    assert page.value("document.activeElement.name") == "dataset"
    choose = "const s=document.querySelector('select[name=check]');s.value='rejected';"
    page.value(f"{choose}s.dispatchEvent(new Event('change',{{bubbles:true}}))")
    at(page, 2)
    assert page.text("#filtered") == "1 · 1"
    assert page.text(".where").startswith("1 of 1")
    choose = "const t=document.querySelector('select[name=decision]');t.value='correct';"
    page.value(f"{choose}t.dispatchEvent(new Event('change',{{bubbles:true}}))")
    page.until("document.querySelector('.empty')?.innerText === 'No trace fits these filters.'")
    page.press("Escape")
    page.press("a")
    assert standing(tmp_path) == {}, "there is nothing to accept"


def test_hostile_records_are_text(chromium: Browser, serve, tmp_path: Path) -> None:
    passage = Passage(
        text=HOSTILE, source=HOSTILE, address=f"javascript:window.hit=6//{HOSTILE}", licence=HOSTILE,
        sha256=text_sha256(HOSTILE),
    )  # fmt: skip
    made = case(0, dataset=HOSTILE, question=HOSTILE, options=(HOSTILE, "b"), answer=HOSTILE, patient=HOSTILE)
    votes = {HOSTILE: 3, "drusen": 5}
    found = Findings(example="made/0", present=("drusen",), votes=votes, n=5, origin="votes")
    trace = Trace(example="made/0", think=HOSTILE, answer=HOSTILE, kept=False, reasons=(f"{HOSTILE}: x",))
    claim = Claim(finding=HOSTILE, role="supportive", quote=HOSTILE, passage=passage.sha256)
    texts = {"text": HOSTILE, "passages": (passage,), "claims": (claim,)}
    known = reviews.knowledge(HOSTILE, (), supportive=(HOSTILE,), **texts)
    server = serve([Made(made.example, found, trace), case(1)], book=(known,))
    page = opened(chromium, server)
    at(page, 0)
    page.press("s")
    shown = page.value("document.querySelector('#case').textContent")
    assert shown.count("</script><script>window.hit=1</script>") >= 9, "all of it stands there, as text"
    assert "\u202e" not in shown
    page.press("f")
    assert "window.hit=1" in page.text("select[name=dataset]")
    page.press("Escape")
    page.press("c")
    page.until("document.querySelector('#check').innerText !== ''")
    page.press("Escape")
    page.press("r")
    page.press("8")
    page.type(HOSTILE)
    page.press("Enter")
    at(page, 1)
    page.press("p")
    page.until("document.querySelector('.decided') !== null")
    assert standing(tmp_path)["made/0"].reason == f"other: {HOSTILE}"
    assert page.value("window.hit") is None
    assert (
        page.value("document.querySelectorAll('#mark, #case script, #case a, [onerror], [onload]').length")
        == 0
    )
    assert page.problems == []
    host = f"http://127.0.0.1:{server.port}/"
    assert page.requests
    assert [one for one in page.requests if not one.startswith(host)] == []


def test_the_policy_stops_what_the_script_would_let_through(chromium: Browser, serve) -> None:
    page = opened(chromium, serve([case(0)]))
    wanted = "try{document.body.innerHTML='<b>x</b>';'written'}catch(error){'refused'}"
    assert page.value(wanted) == "refused"
    with socket.create_server(("127.0.0.1", 0)) as other:
        foreign = f"http://127.0.0.1:{other.getsockname()[1]}/x"
        page.value(f"document.body.append(Object.assign(new Image(), {{src: '{foreign}'}}))")
        page.value(f"fetch('{foreign}').catch(() => 0)")
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.accept()
    assert page.forbidden >= 1


def test_a_missing_picture_and_a_server_that_has_gone_are_said(chromium: Browser, tmp_path: Path) -> None:
    reviews.make(tmp_path / "data", [case(0), case(1)], pictures=False)
    command = [sys.executable, "-m", "data_pipeline.review", "--port=0", f"--data={tmp_path}/data"]
    command += [f"--decisions={tmp_path}/decisions", "--reviewer=anna"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = [process.stdout.readline() for _ in range(2)][1].removeprefix("Open ").strip()
        chromium.open(address)
        chromium.until("document.querySelector('.broken')?.innerText.includes('run the ingest job again')")
        process.kill()
    chromium.press("a")
    chromium.until("document.querySelector('#told.bad')?.innerText.includes('does not answer')")
    assert standing(tmp_path) == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1200])
def test_it_fits_the_screen_and_can_be_read(chromium: Browser, serve, width: int, scheme: str) -> None:
    page = opened(chromium, serve([case(0, f"{GOOD} {'haemorrhage' * 40}")]))
    page.size(width, 860, scheme)
    assert page.value("document.documentElement.scrollWidth") <= width, "nothing is cut off at the side"
    assert page.value("document.querySelector('.frame img').clientWidth") >= 300
    for key in ("r", "c", "?"):
        page.press(key)
        page.until("document.querySelector('dialog[open]') !== null")
        assert page.value("(d => d.scrollWidth <= d.clientWidth)(document.querySelector('dialog[open]'))")
        page.press("Escape")
    low = page.value(CONTRAST)
    assert low == [], "text of too little contrast (WCAG AA: 4.5)"


# Elements with text of their own whose colour is too near to what lies behind it.
CONTRAST = """
[...document.querySelectorAll('#case *, header *, body > footer *')]
.filter(e => !e.closest('svg, select, [hidden], :disabled') && e.getClientRects().length
  && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
.map(e => {
  const read = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => sum + w * linear(c[i] / 255), 0);
  const layers = [];
  for (let n = e; n; n = n.parentElement) layers.unshift(read(getComputedStyle(n).backgroundColor));
  const over = (under, [r, g, b, a = 1]) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
  const back = light(layers.reduce(over, [255, 255, 255])), ink = light(read(getComputedStyle(e).color));
  const ratio = (Math.max(back, ink) + 0.05) / (Math.min(back, ink) + 0.05);
  return [ratio, e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 30)];
}).filter(([ratio]) => ratio < 4.5)
"""
