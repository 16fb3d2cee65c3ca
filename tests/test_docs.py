"""The documents say what the code does: links, commands, columns, purposes, scores and names are compared with the real ones."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import re
import runpy
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pyarrow as pa
import pytest
from kdprune_cli import main as cli

import kdprune_data
import kdprune_data.formats.scores
from kdprune_data import errors
from kdprune_data.formats import dynamics, indexing, logit_files, subset
from kdprune_data.selectors import SELECTORS

ROOT = Path(__file__).resolve().parents[1]
DOCS = {str(p.relative_to(ROOT)): p for p in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXTS = {name: p.read_text(encoding="utf-8") for name, p in DOCS.items()}
FORMATS, METHODS = (TEXTS[f"docs/{name}.md"] for name in ("formats", "methods"))
SOURCES = {str(p.relative_to(ROOT)): p for folder in ("kdprune_data", "pipelines", "cli") for p in sorted((ROOT / folder).rglob("*.py"))}
TYPES = {
    "string": pa.string(),
    "uint64": pa.uint64(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "bool": pa.bool_(),
    "fixed binary 32": pa.binary(32),
}
"""How docs/formats.md calls a column's type."""
INHERITED = {"forward", "tell", "writable", "write"}
"""Methods that say nothing new: torch's and io's own documentation holds."""
FILLED = "..."
"""Stands for what an f-string fills in."""
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def split(text: str) -> Iterator[tuple[bool, str]]:
    """The lines of a document, each with whether it is code: fenced, or indented by four spaces."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        else:
            yield fenced or line.startswith("    "), line


def prose(text: str) -> str:
    """A document without its code blocks."""
    return "\n".join(line for code, line in split(text) if not code)


def blocks(text: str) -> list[str]:
    """The lines of a document's code blocks."""
    return [line.strip() for code, line in split(text) if code]


def anchors(text: str) -> set[str]:
    """What a `#fragment` may name: the headings, as GitHub spells them in addresses."""
    met: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{met[slug]}" if met[slug] else slug)
        met[slug] += 1
    return found


def rows_after(text: str, start: str) -> list[list[str]]:
    """The rows, without the head, of the first table whose head or the text before it holds `start`."""
    after = text[text.index(start) :]
    table = re.search(r"^\|[-| ]+\|\n((?:\|.*\n?)+)", after, re.M)
    assert table is not None, f"no table after {start!r}"
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table[1].splitlines()]


def columns_after(start: str) -> list[tuple[str, pa.DataType]]:
    """Names and types of a table of columns in docs/formats.md."""
    rows = rows_after(FORMATS, start)
    return [(name, TYPES[kind.split(",")[0]]) for names, kind, *_ in rows for name in SPAN.findall(names)]


def parameters(name: str) -> set[str]:
    """Every spelling of every option of a command."""
    command = cli.group.get_command(click.Context(cli.group), name)
    assert command is not None, f"there is no command {name!r}: {', '.join(cli.COMMANDS)}"
    return {"-h", "--help", *(flag for p in command.params if isinstance(p, click.Option) for flag in p.opts)}


def command_lines(words: list[str]) -> Iterator[list[str]]:
    """The arguments after each `kdprune-data` in a line of shell, up to `&&`, `;` or `|`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", ";", "|"):
            parts.append([])
        else:
            parts[-1].append(word)
    for part in parts:
        if part[:1] == ["kdprune-data"] and part[1:]:
            yield part[1:]


def check_names(line: str) -> None:
    """The commands and options of a line exist. (It may be a mention: `kdprune-data import`.)"""
    for arguments in command_lines(shlex.split(line, comments=True)):
        words = [word.split("=")[0] for word in arguments if word not in ("-v", "--debug", "--verbose", "--version", "--help", "-h")]
        if words and words[0] != FILLED:
            assert {word for word in words[1:] if word.startswith("-")} <= parameters(words[0]), line


def check_whole(line: str) -> None:
    """A line that somebody may paste: click takes it, with all that it must have. Nothing is run."""
    check_names(line)
    for arguments in command_lines(shlex.split(line, comments=True)):
        if not arguments[0].startswith("-"):
            command = cli.group.get_command(click.Context(cli.group), arguments[0])
            assert command is not None
            command.make_context(arguments[0], arguments[1:])


def strings(tree: ast.AST) -> Iterator[str]:
    """Every text in a source file; what an f-string fills in stands as FILLED."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else FILLED for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name: str) -> None:
    """Every relative link names a file that exists, and every fragment a heading in it."""
    for target in LINK.findall(prose(TEXTS[name])):
        if re.match(r"\w+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (DOCS[name].parent / path).resolve() if path else DOCS[name]
        assert file.exists(), target
        assert not fragment or fragment in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", DOCS)
def test_commands_in_documents_exist(name: str) -> None:
    """Lines of shell are taken by click as they stand; commands and options that are mentioned exist."""
    for line in blocks(TEXTS[name]):
        if "kdprune-data " in line and not line.startswith(("#", "<")):
            check_whole(line)
    for span in SPAN.findall(prose(TEXTS[name])):
        check_names(" ".join(span.split()))


@pytest.mark.parametrize("name", DOCS)
def test_options_in_documents_exist(name: str) -> None:
    """Every `--option` that is mentioned belongs to some command."""
    known = {"--version"}.union(*(parameters(command) for command in cli.COMMANDS))
    met = {flag for span in SPAN.findall(prose(TEXTS[name])) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert met - known == set()


def test_the_page_of_commands_is_up_to_date() -> None:
    """docs/cli.md is what docs/make_cli.py makes now: run it after a change of options, help texts or examples."""
    made = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["page"]()
    assert TEXTS.get("docs/cli.md", "").splitlines() == made.splitlines()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_of_commands_are_right(command: str) -> None:
    """A command's own examples run that command, and click takes them."""
    module = importlib.import_module(cli.module_of(command))
    for line in module.EXAMPLES.splitlines():
        assert line.split()[:2] == ["kdprune-data", command]
        check_whole(line)


@pytest.mark.parametrize("name", SOURCES)
def test_commands_in_messages_exist(name: str) -> None:
    """What messages, docstrings and help texts tell people to run can be run."""
    for text in strings(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        for line in text.splitlines():
            if line.strip().startswith("kdprune-data "):
                check_whole(line.strip())
        for span in SPAN.findall(text):
            if span.startswith("kdprune-data "):
                check_names(span)


@pytest.mark.parametrize("name", DOCS)
def test_python_in_documents_imports(name: str) -> None:
    """What examples import from us is there."""
    for module, names in re.findall(r"^from (kdprune_\S+) import (.+)$", "\n".join(blocks(TEXTS[name])), re.M):
        assert [n for n in names.split(", ") if not hasattr(importlib.import_module(module), n)] == []


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public classes and functions, and the public methods of public classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and node.name not in INHERITED:
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_public_has_a_docstring(name: str) -> None:
    """Modules, classes, functions and methods."""
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert [what for what, node in public(tree.body) if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", SOURCES)
def test_docstrings_are_sentences(name: str) -> None:
    """A docstring's first paragraph ends as a sentence does; the errors it names are ours or Python's; nothing is left for later."""
    text = SOURCES[name].read_text(encoding="utf-8")
    tree = ast.parse(text)
    found = {"module": ast.get_docstring(tree)} | {what: ast.get_docstring(node) for what, node in public(tree.body)}
    for what, said in found.items():
        first = (said or "").split("\n\n")[0]
        assert first.endswith((".", ".)", "?", ":")), f"{what}: {first!r}"
        raises = re.findall(r"\b[A-Z]\w*Error\b", " ".join(re.findall(r"Raises? (.*?)(?:\.|$)", said or "", re.DOTALL)))
        assert [error for error in raises if not hasattr(errors, error) and not hasattr(builtins, error)] == [], what
    assert re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", text) == []


@pytest.mark.parametrize("package", [p.parent for p in sorted(ROOT.glob("*/**/py.typed"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_say_what_they_are(package: Path) -> None:
    """A package is a module too: its `__init__.py` holds the docstring."""
    assert (package / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("start", "schema"),
    [
        ("**index.parquet**", indexing.SCHEMA),
        ("column of `selection.parquet`", subset.SCHEMA),
        ("**Dynamics**", dynamics.SCHEMA),
    ],
)
def test_tables_of_columns(start: str, schema: pa.Schema) -> None:
    """Names, types and order of columns are the code's."""
    assert columns_after(start) == [(field.name, field.type) for field in schema]


def test_columns_told_in_prose() -> None:
    """ranking.parquet, the rows of a logit cache, the columns of a view file."""
    ranking = re.search(r"`ranking.parquet` \(([^:]+):", FORMATS)
    assert ranking is not None
    assert SPAN.findall(ranking[1]) == subset.RANKING_SCHEMA.names
    rows = re.search(r"^`rows`: (.+?)\.\s", FORMATS, re.M | re.S)
    assert rows is not None
    told = re.findall(rf"`(\w+)` ({'|'.join(TYPES)})", rows[1])
    assert [(name, TYPES[kind]) for name, kind in told] == [(field.name, field.type) for field in logit_files.ROWS_SCHEMA]
    view = [name for names, *_ in rows_after(FORMATS, "A view file is") for name in SPAN.findall(names)]
    assert view == [*logit_files.GEOMETRY, "flip", "logits"]


def test_purposes_of_order() -> None:
    """The purposes listed are those that the code hashes with, and derives seeds for (of what follows a slash, numbers are left out)."""
    told = {name for row in rows_after(FORMATS, "| purpose |") for name in SPAN.findall(row[0])}
    used = set()
    for path in SOURCES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for function, place in (("order_hash", 2), ("order.derived", 1)):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(function):
                    used |= set(strings(node.args[place]))
    assert {re.sub("/[A-Z]$", "/", purpose) for purpose in told} == {purpose.removesuffix(FILLED) for purpose in used}


def test_scores_in_formats() -> None:
    """docs/formats.md lists the scores of the code, each with its hard end and what it is read from."""
    told = {row[0].strip("`"): (row[2], row[3].split()[0]) for row in rows_after(FORMATS, "| score |")}
    assert told == {name: (score.hard, score.source) for name, score in kdprune_data.formats.scores.SCORES.items()}


def test_methods_in_methods() -> None:
    """docs/methods.md has one table of every method: each score with its hard end, what nests, and a section that defines each."""
    rows = {row[0].strip("`"): row for row in rows_after(METHODS, "## All methods")}
    scores, methods = kdprune_data.formats.scores.SCORES, {name: one for name, one in SELECTORS.items() if name != "score"}
    assert rows.keys() == scores.keys() | methods.keys()
    assert {name: rows[name][2] for name in scores} == {name: score.hard for name, score in scores.items()}
    assert {name: rows[name][4] for name in methods} == {name: "yes" if one.nested else "no" for name, one in methods.items()}
    for name, one in methods.items():
        assert all(need in rows[name][1] or need in METHODS for need in one.needs(one.params())), name
        assert ("weights" in rows[name][2]) == (name in ("craig", "gradmatch"))
    headings = set(re.findall(r"\w+", " ".join(re.findall(r"^#+ (.+)$", METHODS, re.M)).lower()))
    assert rows.keys() - headings == set()


@pytest.mark.parametrize("package", ["kdprune_data", "kdprune_data.scores", "kdprune_data.selectors", "kdprune_data.sources"])
def test_public_names_are_there(package: str) -> None:
    """Everything in `__all__` can be had; what the documents call `kdprune_data.NAME` is a public name or a module."""
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if getattr(module, name, None) is None] == []
    for text in TEXTS.values():
        for name in re.findall(rf"(?<![\w.]){re.escape(package)}\.(\w+)", prose(text)):
            assert name in module.__all__ or importlib.util.find_spec(f"{package}.{name}"), name


@pytest.mark.parametrize("name", [name for name in kdprune_data.__all__ if not name.startswith("_")])
def test_public_names_are_told_of(name: str) -> None:
    """README.md or the changelog says what each is for."""
    assert any(f"kdprune_data.{name}`" in TEXTS[text] or f"import {name}" in TEXTS[text] for text in ("README.md", "CHANGELOG.md"))


def test_one_version() -> None:
    """CITATION.cff and CHANGELOG.md know the version."""
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited is not None
    assert cited[1] == kdprune_data.__version__
    assert re.search(rf"^## (Unreleased|{re.escape(kdprune_data.__version__)})", TEXTS["CHANGELOG.md"], re.M)


def test_the_page_of_benchmarks_is_up_to_date() -> None:
    """docs/benchmarks.md shows the files in benchmarks/results/, each of them: run docs/make_benchmarks.py when one changes."""
    script = runpy.run_path(str(ROOT / "docs" / "make_benchmarks.py"))
    assert TEXTS.get("docs/benchmarks.md", "").splitlines() == script["page"]().splitlines()
    shown = {found["name"] for found in script["TABLE"].finditer(TEXTS.get("docs/benchmarks.md", ""))}
    assert shown == {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
