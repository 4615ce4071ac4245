"""The pages in a real browser: no error in its console, nothing fetched, nothing wider than the screen, votes by keys.

Needs a chromium on the PATH (`apt-get install chromium`). SRLM_SCREENSHOTS=FOLDER keeps the screenshots.
"""

from collections.abc import Iterator
import os
import pathlib
import shutil
from typing import Any

from etils import epath
import made_run
import pytest
import test_comparison
import test_report

from srlm_jax import comparison
from srlm_jax.stages import report as stage

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium")

SIZES = {"narrow": (400, 800), "wide": (1400, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
  with sync_api.sync_playwright() as tool:
    opened = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
  """The files of the report of a made run, in which every text attacks the page, and of a comparison."""
  folder = tmp_path_factory.mktemp("pages")
  run = made_run.whole_run(epath.Path(folder) / "run")
  stage.run(run.artifact(), test_report.tiny_settings(), run.steps())
  both = test_comparison.two_runs(epath.Path(folder))
  third = comparison.read(epath.Path(folder) / "long", "runs/a_third_one_of_a_rather_long_name")
  found = comparison.compare([*both, third])
  (folder / "compare.html").write_text(comparison.html(found))
  return {"report": folder / "run" / "report" / "report.html", "compare": folder / "compare.html"}


class Watched:
  """A page of the browser, and what it complained of, asked for or popped up."""

  def __init__(
    self, browser: "sync_api.Browser", path: pathlib.Path, size: str = "wide", scheme: str = "light"
  ) -> None:
    width, height = SIZES[size]
    self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    self.complaints: list[str] = []
    self.requests: list[str] = []
    self.refused: list[str] = []
    self.page.on("console", lambda message: self.complaints.append(message.text))
    self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
    self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
    self.page.on("request", lambda request: self.requests.append(request.url))
    self.page.on("requestfailed", lambda request: self.refused.append(f"{request.url} {request.failure}"))
    self.url = path.as_uri()
    self.page.goto(self.url)

  def check(self) -> None:
    """Nothing was said in the console, and nothing asked for but the page itself."""
    assert self.complaints == []
    assert self.requests == [self.url]

  def screenshot(self, name: str, folder: pathlib.Path) -> None:
    path = pathlib.Path(os.environ.get("SRLM_SCREENSHOTS") or folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    self.page.screenshot(path=path, full_page=True)
    assert path.stat().st_size > 10_000  # More than an empty page's.


def brightness(watched: Watched) -> float:
  """Of the page's background, 0 … 255."""
  colour = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
  channels = [float(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
  return sum(channels) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("name", ["report", "compare"])
def test_pages_open_clean_and_fit(
  browser: "sync_api.Browser", pages: dict[str, pathlib.Path], name: str, size: str, scheme: str, tmp_path: pathlib.Path
) -> None:
  watched = Watched(browser, pages[name], size, scheme)
  assert watched.page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
  assert (brightness(watched) > 128) == (scheme == "light")
  watched.screenshot(f"{name}-{size}-{scheme}", tmp_path)
  watched.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
  assert watched.page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
  watched.check()
  watched.page.close()


@pytest.mark.parametrize("size", list(SIZES))
def test_the_contents_lead_to_every_section(
  browser: "sync_api.Browser", pages: dict[str, pathlib.Path], size: str
) -> None:
  watched = Watched(browser, pages["report"], size)
  watched.page.add_style_tag(content="html { scroll-behavior: auto !important }")
  links = watched.page.locator("nav a")
  assert links.count() >= 8
  for link in links.all():
    link.click()
    target = link.get_attribute("href")
    top = watched.page.evaluate("anchor => document.querySelector(anchor).getBoundingClientRect().top", target)
    last = watched.page.evaluate("innerHeight + scrollY >= document.documentElement.scrollHeight - 1")
    assert -1 <= top <= 120 or last, target
    assert link.is_visible()  # The contents stay in sight.
  assert watched.complaints == []
  watched.page.close()


def test_print_leaves_out_what_paper_cannot_do(browser: "sync_api.Browser", pages: dict[str, pathlib.Path]) -> None:
  watched = Watched(browser, pages["report"])
  assert watched.page.locator("nav").is_visible()
  watched.page.emulate_media(media="print")
  assert not watched.page.locator("nav").is_visible()
  assert watched.page.pdf(format="A4").startswith(b"%PDF")
  watched.check()
  watched.page.close()


def test_the_watch_sees_what_it_is_there_for(browser: "sync_api.Browser", tmp_path: pathlib.Path) -> None:
  page = tmp_path / "bad.html"
  page.write_text("<img src='missing.png'><script>console.log('said'); alert('popped'); throw Error('thrown')</script>")
  watched = Watched(browser, page)
  assert len(watched.requests) == 2
  assert {"said", "popped", "thrown"} <= set(watched.complaints)
  watched.page.close()


def test_the_browser_itself_refuses_scripts_and_sources(
  browser: "sync_api.Browser", pages: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
  attack = "<script>alert(1)</script><img src='there.svg' onload='alert(2)'>"
  (tmp_path / "there.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>")
  (tmp_path / "attacked.html").write_text(pages["report"].read_text().replace('<main id="top">', attack))
  watched = Watched(browser, tmp_path / "attacked.html")
  assert [one.rpartition("/")[2] for one in watched.refused] == ["there.svg csp"]
  assert any("Content Security Policy" in one for one in watched.complaints)
  assert not {"1", "2"} & set(watched.complaints)  # Neither popped up.
  watched.page.close()


@pytest.fixture(scope="module")
def voting(tmp_path_factory: pytest.TempPathFactory) -> "tuple[pathlib.Path, Any]":
  """The page of a human evaluation whose answers attack it, and its key."""
  human_eval = pytest.importorskip("srlm_jax.human_eval", reason="this version has no human evaluation")
  answers = (made_run.GOOD, made_run.EVIL, "</script><script>alert('closed')</script>")
  pairs = [
    (made_run.response(f"h{place}", 0, text), made_run.response(f"h{place}", 0, made_run.BAD))
    for place, text in enumerate(answers)
  ]
  text, key = human_eval.make(pairs, ("m2", "m1"), {"m2": "a" * 64, "m1": "b" * 64}, 3, seed=7)
  path = tmp_path_factory.mktemp("voting") / "page.html"
  path.write_text(text)
  return path, key


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_the_voting_page_opens_clean_and_fits(
  browser: "sync_api.Browser", voting: "tuple[pathlib.Path, Any]", size: str, scheme: str, tmp_path: pathlib.Path
) -> None:
  watched = Watched(browser, voting[0], size, scheme)
  assert watched.page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
  assert (brightness(watched) > 128) == (scheme == "light")
  watched.screenshot(f"voting-{size}-{scheme}", tmp_path)
  watched.check()
  watched.page.close()


def test_votes_by_keys_are_kept_and_saved(
  browser: "sync_api.Browser", voting: "tuple[pathlib.Path, Any]", tmp_path: pathlib.Path
) -> None:
  from srlm_jax import human_eval

  path, key = voting
  watched = Watched(browser, path)
  page = watched.page
  shown = {made_run.GOOD, made_run.EVIL, made_run.BAD, "</script><script>alert('closed')</script>"}
  for press in ("2", "ArrowLeft", "u", "1", "ArrowDown"):
    assert {page.locator("#left-text").text_content(), page.locator("#right-text").text_content()} <= shown
    page.keyboard.press(press)
  assert page.locator("#count").text_content() == "3 of 3 done" and page.locator("#done").is_visible()
  page.locator("#save").click()
  assert "name" in page.locator("#status").text_content()
  page.locator("#annotator").fill("Ada 1")  # Typing is no voting.
  with page.expect_download() as saved:
    page.locator("#save").click()
  saved.value.save_as(tmp_path / "votes.json")
  [ballot] = human_eval.read_ballots([epath.Path(tmp_path / "votes.json")], key)
  assert ballot.annotator == "Ada 1"
  assert list(ballot.votes.values()) == ["right", "left", "tie"]
  page.reload()
  assert page.locator("#count").text_content() == "3 of 3 done"
  assert page.locator("#annotator").input_value() == "Ada 1"
  assert watched.complaints == []
  assert {url for url in watched.requests if not url.startswith("blob:")} == {watched.url}
  page.close()
