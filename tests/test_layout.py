"""The rooms of the code and which way imports run between them, read from the source with `ast`; and what the repository holds.

    cli -> pipelines -> learn | scores | selectors | sources | share | report -> formats -> errors, config, order, images, _version

Nothing is imported here but by the one test that must; a failure names the file and the line.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kdprune_data": "kdprune_data", "kdprune_pipelines": "pipelines", "kdprune_cli": "cli"}
BASE = {"errors", "config", "order", "images", "_version"}
PARTS = {"learn", "scores", "selectors", "sources", "share", "report"}
MAY_IMPORT = {
    "cli": {"cli", "pipelines", *BASE},
    "pipelines": {"pipelines", "formats", *PARTS, *BASE},
    **{part: {part, *BASE} for part in ("learn", "scores", "selectors")},
    **{part: {part, "formats", *BASE} for part in ("sources", "share", "report")},
    "formats": {"formats", *BASE},
    **dict.fromkeys(BASE, BASE),
    "errors": set(),
    "_version": set(),
    "kdprune_data": {"formats", *PARTS, *BASE},
}
"""For each room, the rooms it may import. `kdprune_data` is the package's own `__init__`, which hands names on."""
READS_FORMATS = {f"kdprune_data.learn.{name}" for name in ("decoded", "loader", "stream", "webdataset")}
"""The only modules of `learn`, `scores` and `selectors` that know of files."""
NEVER_TORCH = {*BASE, "formats", "sources", "selectors"}
TORCH = {"torch", "torchvision", "timm", "safetensors.torch"}
CHAINS = {"demo", "run", "full", "sweep", "reproduce", "plan"}
"""The stages that run other stages."""
NO_STAGE = {"completion"}
"""The commands that are about the command line itself."""
REQUIRED = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", ".gitignore", "docs", "tests", *FOLDERS.values()}
ALLOWED = {"benchmarks", "examples", ".ci", ".github", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md", ".pre-commit-config.yaml"}


class Import(NamedTuple):
    """One name imported: `where` is `top`, `function` or `typing` (under TYPE_CHECKING)."""

    name: str
    where: str
    line: int


def module_of(path: Path) -> str:
    """The import name of a source file: `pipelines/demo.py` is `kdprune_pipelines.demo`."""
    folder = path.relative_to(ROOT).with_suffix("")
    package = next(name for name, at in FOLDERS.items() if folder.parts[0] == at)
    return ".".join([package, *folder.parts[1:]]).removesuffix(".__init__")


MODULES = {module_of(p): p for folder in FOLDERS.values() for p in sorted((ROOT / folder).rglob("*.py"))}
STAGES = [n for n in MODULES if re.fullmatch(r"kdprune_pipelines\.[a-z]\w*", n)]
COMMANDS = [
    n for n in MODULES if n.startswith("kdprune_cli.") and n not in ("kdprune_cli.main", "kdprune_cli.options", "kdprune_cli.endings")
]


def room_of(module: str) -> str:
    """`cli`, `pipelines`, a room of `kdprune_data`, or `kdprune_data` for its `__init__`."""
    parts = module.split(".")
    if parts[0] != "kdprune_data":
        return FOLDERS[parts[0]]
    return parts[1] if len(parts) > 1 else "kdprune_data"


@cache
def tree_of(module: str) -> ast.Module:
    """The parsed source."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    """Every name a module imports, `from a import b` as `a.b` where that is a module of ours, else as `a`."""
    return tuple(_imports(tree_of(module), "top"))


def _imports(node: ast.AST, where: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, where, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield Import(inner if inner in MODULES or inner in TORCH else str(child.module), where, child.lineno)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, "function")
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _imports(ast.Module(child.body, []), "typing")
            yield from _imports(ast.Module(child.orelse, []), where)
        else:
            yield from _imports(child, where)


def is_ours(name: str) -> bool:
    """Whether a name is one of the three packages, or inside one."""
    return name.split(".")[0] in FOLDERS


def is_torch(name: str) -> bool:
    """Whether importing a name loads torch by itself."""
    return any(name == heavy or name.startswith(heavy + ".") for heavy in TORCH)


def listed(module: str, found: list[Import]) -> list[str]:
    """For messages: `pipelines/demo.py:12 imports NAME`."""
    return [f"{MODULES[module].relative_to(ROOT)}:{one.line} imports {one.name}" for one in found]


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    """No module imports from a room that its own may not know. (TYPE_CHECKING and functions are no way around.)"""
    allowed = MAY_IMPORT[room_of(module)] | ({"formats"} if module in READS_FORMATS else set())
    wrong = [one for one in imports_of(module) if is_ours(one.name) and room_of(one.name) not in allowed]
    assert listed(module, wrong) == []


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in NEVER_TORCH])
def test_files_and_selection_know_no_torch(module: str) -> None:
    """Bytes, sources and selection work without torch, inside functions too."""
    assert listed(module, [one for one in imports_of(module) if is_torch(one.name)]) == []


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) == "selectors"])
def test_selectors_need_numpy_and_scikit_learn_alone(module: str) -> None:
    """A selection method is numbers in, row numbers out."""
    allowed = {"numpy", "sklearn", "threadpoolctl", *sys.stdlib_module_names}
    wrong = [one for one in imports_of(module) if not is_ours(one.name) and one.name.split(".")[0] not in allowed]
    assert listed(module, wrong) == []


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) == "pipelines"])
def test_stages_load_torch_when_they_run(module: str) -> None:
    """torch, `learn` and `scores` are imported inside functions, or for types alone."""
    heavy = [one for one in imports_of(module) if is_torch(one.name) or one.name.startswith(("kdprune_data.learn", "kdprune_data.scores"))]
    assert listed(module, [one for one in heavy if one.where == "top"]) == []


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) == "pipelines"])
def test_stages_talk_through_files(module: str) -> None:
    """No stage imports another, nor does a helper import a stage; only the stages that chain others do."""
    if module.removeprefix("kdprune_pipelines.") in CHAINS:
        return
    assert listed(module, [one for one in imports_of(module) if one.name in STAGES]) == []


@pytest.mark.parametrize("module", STAGES)
def test_stage_is_one_run_of_one_config(module: str) -> None:
    """A stage's only public function is `run(config)`."""
    functions = [node for node in tree_of(module).body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert [(f.name, [a.arg for a in f.args.args]) for f in functions] == [("run", ["config"])]


def test_every_command_is_a_stage() -> None:
    """`cli/` and `pipelines/` hold the same verbs, and the group lists them all."""
    names = {m.split(".")[1] for m in COMMANDS}
    assert names - NO_STAGE == {m.split(".")[1] for m in STAGES}
    table = next(n for n in tree_of("kdprune_cli.main").body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "COMMANDS")
    assert {name.rstrip("_") for name in names} == set(ast.literal_eval(table.value))


def test_commands_are_loaded_without_torch() -> None:
    """What `--help` of every command imports, nothing left out: no torch, directly or through others."""
    code = f"import sys\nfor name in {COMMANDS + STAGES}: __import__(name)\nprint(sorted({{'torch', 'torchvision'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_runs_foreign_code(module: str) -> None:
    """No pickle, eval, exec, shell, or bare except; `torch.load` only of weights."""
    found = [f"{MODULES[module].relative_to(ROOT)}:{line} {what}" for line, what in _dangers(tree_of(module))]
    assert found == []


def _dangers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            yield from ((node.lineno, name) for name in names if name in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"))
        if isinstance(node, ast.Call):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "os.system", "os.popen") or keywords.get("shell", "False") != "False":
                yield node.lineno, name
            if name == "torch.load" and keywords.get("weights_only") != "True":
                yield node.lineno, "torch.load without weights_only=True"
            if keywords.get("allow_pickle", "False") != "False":
                yield node.lineno, f"{name} with allow_pickle"


def test_dangers_are_seen() -> None:
    """The check above finds what it is for."""
    code = (
        "import pickle\ntry:\n  eval('1')\nexcept:\n  torch.load(f)\nos.system('ls')\nnp.load(f, allow_pickle=True)\n"
        "run('ls', shell=True)\nmodel.eval()\ntorch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)"
    )
    assert sorted(line for line, _ in _dangers(ast.parse(code))) == [1, 3, 4, 5, 6, 7, 8]


def packages() -> dict[str, Path]:
    """Every package by name: a folder of ours that holds Python files or the mark of a typed package."""
    found = {p.parent for folder in FOLDERS.values() for pattern in ("*.py", "py.typed") for p in (ROOT / folder).rglob(pattern)}
    return {module_of(folder / "__init__.py"): folder for folder in sorted(found)}


def test_every_package_is_listed() -> None:
    """A sub-package that pyproject.toml does not list is missing from the wheel and nowhere else."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(packages())
    assert setuptools["package-dir"] == FOLDERS


@pytest.mark.parametrize("package", packages())
def test_every_package_is_typed(package: str) -> None:
    """Each has a `py.typed`."""
    assert (packages()[package] / "py.typed").is_file()


@cache
def repository() -> tuple[str, ...]:
    """The files git tracks, or would. Skips outside a checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return tuple(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


def test_top_level_holds_what_it_should() -> None:
    """Nothing is missing, and nothing was left lying about."""
    found = {name.split("/")[0] for name in repository()}
    assert found - ALLOWED == REQUIRED


def test_no_paths_of_one_machine() -> None:
    """No text file names a folder that only somebody's machine has."""
    private = re.compile(r"(?<![\w./:-])/(?:home|work|tmp|root|Users|mnt|scratch)/\w")
    texts = {name: (ROOT / name).read_bytes().decode("utf-8", "replace") for name in repository()}
    lines = [(name, n, line) for name, text in texts.items() if "\0" not in text for n, line in enumerate(text.splitlines(), 1)]
    assert [f"{name}:{n}: {line.strip()}" for name, n, line in lines if private.search(line)] == []
