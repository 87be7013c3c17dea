"""The shape of the toolkit: four flat programs, imports one way, nothing but the standard library."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("client", "server", "smtp_module", "embedded_smtpd")
MAY_IMPORT = {
    "client": set(),
    "smtp_module": set(),
    "server": {"smtp_module"},
    "embedded_smtpd": {"smtp_module"},
}


def imported(program: str) -> set[str]:
    tree = ast.parse((ROOT / f"{program}.py").read_text("utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import_the_standard_library_and_each_other_one_way(program: str) -> None:
    ours = imported(program) & set(PROGRAMS)
    assert ours <= MAY_IMPORT[program]
    assert imported(program) - set(PROGRAMS) <= set(sys.stdlib_module_names)


def test_no_fifth_program_stands_at_the_top() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_help_and_version(program: str) -> None:
    for flag in ("--help", "--version"):
        done = subprocess.run(
            [sys.executable, str(ROOT / f"{program}.py"), flag], capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stderr
        assert program in done.stdout


def test_readme_and_env_example_name_the_same_variables() -> None:
    in_tables = set()
    for line in (ROOT / "README.md").read_text("utf-8").splitlines():
        if line.startswith("| `"):
            in_tables |= set(re.findall(r"`((?:ALERT|SMTP|DEVICE)_[A-Z_]+)`", line.split("|")[1]))
    named = set(re.findall(r"(?m)^#?([A-Z]+_[A-Z_]+)=", (ROOT / ".env.example").read_text("utf-8")))
    assert named == in_tables | {"SMTP_PASS_FILE", "SMTP_PASS_COMMAND"}


def test_development_needs_pytest_and_aiosmtpd_only() -> None:
    assert (ROOT / "requirements-dev.txt").read_text().split() == ["pytest", "aiosmtpd"]
