"""What a browser makes of a page but for its texts, to see that no text changes it."""

import html.parser


class Skeleton(html.parser.HTMLParser):
  """A page without its texts: its tags, their attributes, and the values of those that a browser acts on."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.found: list[tuple[str, ...]] = []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    acted = [f"{name}={value}" for name, value in attrs if name in ("href", "src", "style", "http-equiv", "content")]
    self.found.append((tag, *(name for name, _ in attrs), *acted))

  def handle_endtag(self, tag: str) -> None:
    self.found.append(("/" + tag,))

  def handle_comment(self, data: str) -> None:
    self.found.append(("comment",))
