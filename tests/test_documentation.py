"""The documentation stays true: docstrings are complete, names and links in the pages exist."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afa.config.keys import all_keys, keys_markdown

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "afa").rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SECTIONS = sorted({key.name.split(".")[0] for key in all_keys()})

Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def public_functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Public module-level functions, and public methods of public classes, with their dotted names."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                is_public = isinstance(member, Function) and (
                    not member.name.startswith("_") or member.name == "__call__"
                )
                if isinstance(member, Function) and is_public:
                    yield f"{node.name}.{member.name}", member


def parameters(function: Function) -> dict[str, str]:
    """Name -> annotation of each parameter but self and cls."""
    args = function.args
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    found = {arg.arg: ast.unparse(arg.annotation) if arg.annotation else "" for arg in every if arg is not None}
    return {name: kind for name, kind in found.items() if name not in ("self", "cls", "_")}


def documented_args(docstring: str) -> dict[str, str]:
    """Name -> text of each entry of the Args section; `a, b: text` documents both."""
    match = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    entries: dict[str, str] = {}
    if match:
        for names, text in re.findall(r"^ {4}([*\w, ]+): (.*(?:\n {5,}.*)*)", match.group(1), re.MULTILINE):
            entries |= {name.strip().lstrip("*"): text for name in names.split(",")}
    return entries


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{relative(path)}: the module says nothing of itself"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{relative(path)}:{node.lineno} class {node.name}"
    for name, function in public_functions(path):
        assert ast.get_docstring(function), f"{relative(path)}:{function.lineno} {name}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_args_sections_name_the_parameters(path: Path) -> None:
    """An Args section names exactly the parameters; the shape of tensors and arrays is always told.

    A docstring without sections may tell it in passing, `(B, H, W)`, or point to another one, "see `other`".
    """
    for name, function in public_functions(path):
        docstring = ast.get_docstring(function) or ""
        documented, actual = documented_args(docstring), parameters(function)
        where = f"{relative(path)}:{function.lineno} {name}"
        assert not documented or set(documented) == set(actual), f"{where}: {set(documented) ^ set(actual)}"
        is_short = not re.search(r"^(Args|Returns):", docstring, re.MULTILINE)
        is_short = is_short and bool(re.search(r"\([A-Z\d]\w*, |scalar|any shape|see `", docstring))
        tensors = {arg for arg, kind in actual.items() if re.search(r"\b(Tensor|ndarray)\b", kind)}
        assert is_short or tensors <= set(documented), f"{where}: no shape of {tensors - set(documented)}"


def test_every_configuration_field_has_a_text_under_it() -> None:
    path = ROOT / "src" / "afa" / "config" / "schema.py"
    checked = 0
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for member, follower in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(member, ast.AnnAssign) and not ast.unparse(member.annotation).endswith("Config"):
                is_text = isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant)
                assert is_text, f"{node.name}.{ast.unparse(member.target)}"
                checked += 1
    assert checked == len(all_keys()) + 1, "every field of every section, and the preset"


def test_the_page_of_keys_is_what_the_schema_says() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == keys_markdown(), "afa keys --markdown > docs/configuration.md"


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_pages_name_only_existing_configuration_keys(path: Path) -> None:
    known = {key.name for key in all_keys()}
    pattern = rf"(?<![\w./])({'|'.join(SECTIONS)})\.([a-z_0-9]+)\b(?!\()"
    for section, key in re.findall(pattern, path.read_text(encoding="utf-8")):
        is_file = key in {"txt", "csv", "yaml", "json", "jsonl", "toml", "md", "py", "npz", "png"}
        assert is_file or f"{section}.{key}" in known, f"{relative(path)} mentions {section}.{key}"


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_pages_name_only_existing_code(path: Path) -> None:
    for dotted in sorted(set(re.findall(r"`(afa(?:\.\w+)+)", path.read_text(encoding="utf-8")))):
        assert resolves(dotted), f"{relative(path)} mentions {dotted}"


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(found, name) and name not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, name, None)
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{relative(path)} links to {link}"
        assert not anchor or anchor in anchors(file), f"{relative(path)} links to {link}: no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {anchor(heading) for heading in headings}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_reachable_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "docs" / "lab" / "README.md"]:
        assert relative(page) in readme, page.name


def test_the_lab_book_lists_every_entry() -> None:
    folder = ROOT / "docs" / "lab"
    contents = (folder / "README.md").read_text(encoding="utf-8")
    for month in folder.glob("20*.md"):
        for heading in re.findall(r"^## (.*)$", month.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"{month.name}#{anchor(heading)})" in contents, heading


# Spelled in pieces so that this file passes its own test.
FOREIGN = [
    re.compile(rf"(?<![\w.])/({'|'.join(['work', 'tmp', 'home', 'root'])})/"),
    re.compile(r"(?<!scope=\")\bsess" r"ions?\b", re.IGNORECASE),
    re.compile("pypi" r"\.org|python" "hosted"),
]


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if not path.is_file() or path.suffix in {".png", ".jpg", ".npz"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for pattern in FOREIGN:
                assert not pattern.search(line), f"{name}:{number}: {line.strip()}"
