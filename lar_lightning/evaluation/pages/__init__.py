"""Templates of the pages, and how they are filled: everything escaped, nothing missing."""

from base64 import b64encode
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def source(name: str) -> str:
    """Return a file of this folder as it is."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def digest(script: str) -> str:
    """Return what a content security policy calls a script by."""
    return f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}"


def fill(template: str, data: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """Fill a template of this folder; what it names must be in `data`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    page = environment.get_template(template).render(data)
    # A lone surrogate, which JSON can hold, cannot be written.
    return page.encode("utf-8", "replace").decode("utf-8")
