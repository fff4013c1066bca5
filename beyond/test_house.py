"""Tests of the house: a core that stands alone, chapters that hang together without circles."""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ["model.py", "sparsify.py", "kernel.py", "generate.py", "calibrate.py", "test_all.py", "README.md"]
CHAPTERS = sorted(path.stem for path in (ROOT / "beyond").glob("*.py") if not path.stem.startswith("test_"))


def imports_of(path):
    """Return the names of all modules that importing a file may import, now or later.

    What a file imports when it runs as a command, under `if __name__ == "__main__"`, is left out.
    """
    names = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.dump(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_core_stands_alone(tmp_path):
    for name in CORE:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("training", "__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (["-m", "pytest", "-q", "test_all.py"], ["generate.py", "--max-new-tokens", "8"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_no_core_file_knows_a_chapter():
    for name in CORE[:-1]:
        assert not any(module.split(".")[0] == "beyond" for module in imports_of(ROOT / name)), name


def test_chapters_import_each_other_without_circles():
    reached = {chapter: {module.split(".")[1] for module in imports_of(ROOT / "beyond" / f"{chapter}.py")
                         if module.startswith("beyond.")} & set(CHAPTERS) for chapter in CHAPTERS}
    while reached:
        leaves = [chapter for chapter, others in reached.items() if not others & reached.keys()]
        assert leaves, f"these import each other in a circle: {sorted(reached)}"
        for leaf in leaves:
            del reached[leaf]


@pytest.mark.parametrize("path", [path.relative_to(ROOT) for path in sorted(ROOT.glob("*.py"))
                                  + sorted(ROOT.glob("beyond/*.py")) + sorted(ROOT.glob("demo/*.py"))], ids=str)
def test_lines_end_at_100_columns(path):
    lines = (ROOT / path).read_text().splitlines()
    assert not [number for number, line in enumerate(lines, start=1) if len(line) > 100]
