"""HTML pages from the package's templates: one frame and one style (page.html.jinja, page.css), everything escaped."""

import functools
from typing import Any

import jinja2


@functools.cache
def _environment() -> jinja2.Environment:
  return jinja2.Environment(
    loader=jinja2.PackageLoader("srlm_jax", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )


def render(template: str, **values: Any) -> str:
  """The page of a template of this package ("report.html.jinja"); all texts among `values` are escaped."""
  return _environment().get_template(template).render(**values)
