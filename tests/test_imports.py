"""The house's arrows: who may import whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "components": {"pipelines"},
    "components/data": {"components.training", "components.evaluation", "components.tracking"},
    "components/objectives": {"components.training", "components.evaluation", "components.tracking"},
    "components/optimizers": {"components.training", "components.evaluation", "components.tracking"},
    "components/training": {"components.evaluation", "components.tracking"},
    "components/evaluation": {"components.training", "components.tracking"},
    "components/tracking": {
        "components.data", "components.objectives", "components.optimizers", "components.training",
        "components.evaluation",
    },
}  # fmt: skip


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_arrows_point_one_way() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for folder, banned in FORBIDDEN.items()
        for file in (ROOT / folder).rglob("*.py")
        for name in imports(file)
        if any(name == module or name.startswith(module + ".") for module in banned)
    ]
    assert not wrong


def test_components_know_no_command_line() -> None:
    for file in (ROOT / "components").rglob("*.py"):
        assert not imports(file) & {"argparse", "sys"}, file
