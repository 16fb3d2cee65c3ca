"""Fills the tables of docs/benchmarks.md: `python docs/make_benchmarks.py`, after a benchmark wrote its results with --out.

The page names a file of benchmarks/results/ in a comment, and what stands between that comment and the next closing one is made from it: on
what it was measured, and its rows. All other text of the page is written by hand. tests/test_docs.py checks that the page is up to date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import lines  # noqa: E402  # a script of the folder that was just named

PAGE = ROOT / "docs" / "benchmarks.md"
TABLE = re.compile(r"<!-- results: (?P<name>[a-z0-9_]+) -->\n.*?<!-- end -->", re.DOTALL)


def made(found: re.Match[str]) -> str:
    """One table, between its comments."""
    name = found["name"]
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    about = ", ".join(f"{what} {value}" for what, value in results["machine"].items())
    body = [f"`benchmarks/{name}.py`: {about}.", "", *lines(results["rows"])]
    return "\n".join([f"<!-- results: {name} -->", *body, "<!-- end -->"])


def page() -> str:
    """The page as it should be."""
    return TABLE.sub(made, PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
