"""Printing never ends a command: real processes with consoles that cannot encode, that close, that are full."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = str(ROOT / "pipelines" / "recipes" / "demo.yaml")
TEXT = "forget_rouge ↓ ␤ ε1 … 東京 \udcff"
PRINTS = f"""
import sys, threading, warnings
from pipelines.cli import leave, run_cli, say
from components.errors import DataError

def run(command):
    for number in range(3):
        say({TEXT!a})
        thread = threading.Thread(target=lambda: print({TEXT!a} * 3000))
        thread.start()
        thread.join()
    sys.stdout.write("\\u2193" * 10)
    print({TEXT!a}, file=sys.stderr)
    warnings.warn({TEXT!a})
    open(sys.argv[-1], "w").write("registered")
    raise DataError({TEXT!a})

leave(run_cli("d", run, lambda command: "", argv=[{DEMO!r}]))
"""


def ends_well(tmp_path: Path, redirect: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command that prints a lot, by a shell that redirects its output; it must reach its end, with its code."""
    done = tmp_path / "done"
    shell = f'{{ "$0" -c "$1" "$2"; echo $? > "$2.code"; }} {redirect}'
    found = subprocess.run(
        ["bash", "-c", shell, sys.executable, PRINTS, str(done)], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.read_text() == "registered", found.stderr
    assert done.with_suffix(".code").read_text() == "1\n"
    return found


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "shift_jis", "ascii:strict", "utf-8:strict"])
def test_what_a_console_cannot_encode_is_escaped(tmp_path: Path, encoding: str) -> None:
    found = ends_well(tmp_path, "", PYTHONIOENCODING=encoding)
    name = encoding.partition(":")[0]
    expected = TEXT.encode(name, "backslashreplace")
    assert found.stdout.splitlines()[0] == expected
    assert found.stdout.endswith(("↓" * 10).encode(name, "backslashreplace"))
    assert found.stderr.splitlines()[0] == expected
    assert found.stderr.splitlines()[-1] == b"DataError: " + expected


@pytest.mark.parametrize(
    ("redirect", "told"),
    [
        ("| head -1", b""),
        ("2>&1 | head -1", b""),
        ("2> >(head -1) | true", b""),
        ("> /dev/full", b"stdout cannot be written: No space left on device. The command goes on without it."),
        ("> /dev/full 2>&1", b""),
        (">&-", b""),
        ("2>&-", b""),
        (">&- 2>&- <&-", b""),
    ],
)
def test_a_console_that_is_lost_ends_nothing(tmp_path: Path, redirect: str, told: bytes) -> None:
    found = ends_well(tmp_path, redirect)
    assert told in found.stderr
    assert b"Traceback" not in found.stderr
    assert b"BrokenPipe" not in found.stderr


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything(tmp_path: Path) -> None:
    """As some terminals' and Node's pipes are: a full one is not an error."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS, str(tmp_path / "done")], cwd=ROOT, stdout=write, stderr=subprocess.DEVNULL
    ) as process:
        os.close(write)
        with open(read, "rb") as stream:
            found = stream.read()
        assert process.wait(60) == 1
    line = TEXT.encode("utf-8", "backslashreplace")
    assert found == 3 * (line + b"\n" + 3000 * line + b"\n") + 10 * "↓".encode()


@pytest.mark.parametrize(("pipeline", "arguments"), [("compare", ["--help"]), ("unlearn", ["--dry-run"]), ("tune", [])])
def test_whole_commands_read_and_print_anything_on_any_console(
    tmp_path: Path, pipeline: str, arguments: list[str]
) -> None:
    (tmp_path / "more.yaml").write_text("data: {system: 東京↓}\n", encoding="utf-8")
    files = [] if pipeline == "compare" else [DEMO, str(tmp_path / "more.yaml")]
    command = [sys.executable, str(ROOT / "pipelines" / f"{pipeline}.py"), *files, *arguments]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    usual = subprocess.run(command, capture_output=True, timeout=60)
    found = subprocess.run(command, env=plain, capture_output=True, timeout=60)
    assert found.returncode == usual.returncode
    assert b"Traceback" not in found.stderr
    assert found.stdout.decode("ascii").count("\n") == usual.stdout.count(b"\n")
    assert ("\\u2193" in found.stdout.decode()) == ("↓" in usual.stdout.decode()) == (pipeline == "unlearn")


def test_every_text_file_is_opened_with_its_encoding() -> None:
    """Else the locale decides what is written, and what another machine reads."""
    missing = []
    for file in sorted([*(ROOT / "components").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and opens_text(call) and not {"encoding"} & {k.arg for k in call.keywords}:
                missing.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert not missing


def opens_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if (owner, name) in (("os", "open"), ("files", "write_text")):  # a descriptor; ours, in UTF-8
        return False
    if name in ("run", "Popen", "check_output"):
        return any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords)
    modes = [c.value for c in [*call.args, *(k.value for k in call.keywords)] if isinstance(c, ast.Constant)]
    binary = name == "open" and any(isinstance(mode, str) and "b" in mode and len(mode) < 4 for mode in modes)
    return name in ("open", "fdopen", "read_text", "write_text", "TextIOWrapper") and not binary
