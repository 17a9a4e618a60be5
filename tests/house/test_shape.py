"""The house keeps its shape: sizes, exports, imports and documents that are true."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "fate_moe"
MODULES = sorted(SRC.rglob("*.py"))
DOCUMENTS = [ROOT / f"{name}.md" for name in
             ("README", "ARCHITECTURE", "GLOSSARY", "CONTRIBUTING", "CHANGELOG")]  # fmt: skip
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
MOST_LINES, MOST_FUNCTION_LINES = 400, 50


def name_of(path: Path) -> str:
    return str(path.relative_to(SRC))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            start = (
                node.body[1].lineno if ast.get_docstring(node) and node.body[1:] else node.lineno
            )
            length = (node.end_lineno or 0) - start + 1
            assert length <= MOST_FUNCTION_LINES, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_which_question_it_answers(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_exports_are_sorted_and_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            assert names == sorted(names)
            assert len(set(names)) == len(names)
            name = "fate_moe." + ".".join(path.relative_to(SRC).parent.parts)
            module = import_module(name.rstrip("."))
            assert all(hasattr(module, exported) for exported in names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_line_prints_or_reads_the_environment(path: Path) -> None:
    if path.parent.name == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") != "print", path
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), path


def test_imports_go_down_only() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_public_names_resolve() -> None:
    import fate_moe

    for name in fate_moe.__all__:
        assert getattr(fate_moe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        fate_moe.lod  # noqa: B018


def test_the_forward_that_joins_the_stages_stays_short() -> None:
    tree = ast.parse((SRC / "moe.py").read_text(encoding="utf-8"))
    forward = next(n for n in ast.walk(tree) if getattr(n, "name", "") == "forward")
    assert isinstance(forward, ast.FunctionDef)
    statements = [n for n in ast.walk(forward) if isinstance(n, ast.stmt)]
    assert len(statements) <= 7  # def, docstring, phase, with, speculate, return


def test_the_code_map_names_every_module_and_nothing_else() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    mapped = set(re.findall(r"^\| `([a-z0-9_/]+\.py)` \|", text, re.MULTILINE))
    real = {name_of(path) for path in MODULES if path.name not in ("__init__.py", "__main__.py")}
    assert mapped == real


def test_glossary_defines_each_word_once() -> None:
    text = (ROOT / "GLOSSARY.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| \*\*(.+?)\*\* \|", text, re.MULTILINE)
    assert len(words) == len(set(words)) >= 40
    for word in ("hit", "late", "miss", "lease", "announce", "speculate", "working set", "record"):
        assert word in words


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists(), target


def test_documented_commands_exist() -> None:
    from typer.main import get_command

    from fate_moe.cli import (  # noqa: F401
        app,
        bench,
        calibrate,
        chat,
        eval,
        generate,
        models,
        policies,
        simulate,
        stores,
        trace,
    )

    known = dict(get_command(app).commands)  # type: ignore[attr-defined]
    for group in [name for name, command in known.items() if hasattr(command, "commands")]:
        inner = known.pop(group).commands.items()
        known |= {f"{group} {name}": command for name, command in inner}
    options = {name: {o for p in command.params for o in p.opts} for name, command in known.items()}
    for path in DOCUMENTS:
        for line in re.findall(
            r"^(?:\$ )?fate (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            name, *rest = line.split()
            if name not in known and rest:
                name, rest = f"{name} {rest[0]}", rest[1:]
            assert name in known, f"{path.name}: fate {name}"
            for flag in re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", " ".join(rest)):
                assert flag in options[name], f"{path.name}: fate {name} {flag}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_document_waits_to_be_filled_in(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@|TODO|TBD", text)
    assert not re.search(r"<!-- (measure:\w+) -->\s*<!-- /\1 -->", text)


def test_the_changelog_speaks_of_this_version() -> None:
    import fate_moe

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", text, re.MULTILINE)
    assert versions[0] == fate_moe.__version__
    assert f'version = "{fate_moe.__version__}"' in (ROOT / "pyproject.toml").read_text()
