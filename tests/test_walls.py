"""The walls of the house: who may import what, what a quick command loads, how modules are named."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "esol").rglob("*.py"), *(ROOT / "shards").rglob("*.py")])
HEAVY = ("torch", "torchvision", "mlflow", "accelerate", "deepspeed", "timm", "webdataset")
WALLS = {
    "accelerate": "esol/engines/",
    "deepspeed": "esol/engines/",
    "mlflow": "esol/tracking/",
    "webdataset": ("esol/data/stream.py", "esol/data/samples.py", "shards/"),
}
# From the ground up: a module imports what stands in its own row and in those above it, nothing below.
ROWS = (
    ("esol.base",),
    ("esol.config",),
    ("esol.data", "esol.models", "esol.ops"),
    ("esol.training.task", "esol.training.losses", "esol.training.head", "esol.training.optim"),
    ("esol.engines",),
    ("esol.training", "esol.tracking", "esol.report.pictures", "esol.report.judge"),
    ("esol.pipeline",),
    ("esol.stages",),
    ("esol.report",),
    ("esol.deploy",),
    ("esol.pipeline.job", "esol.pipeline.doctor"),
    ("esol.pipeline.auto", "esol.pipeline.estimate", "esol.pipeline.recipe"),
    ("esol", "esol.cli", "esol.train"),
)


def row_of(module: str) -> int:
    """The row whose name for it is the longest."""
    names = [(len(name), row) for row, own in enumerate(ROWS) for name in own if f"{module}.".startswith(f"{name}.")]
    return max(names)[1]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at whatever depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_behind_their_walls(path: Path) -> None:
    name, found = str(path.relative_to(ROOT)), imports(path)
    tops = {module.split(".")[0] for module in found}
    for package, places in WALLS.items():
        assert package not in tops or name.startswith(places), f"{name} imports {package}"
    assert "research" not in tops
    assert "benchmarks" not in tops
    if name.startswith("esol/"):
        assert "shards" not in tops
        module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        below = {other for other in found if other.startswith("esol") and row_of(other) > row_of(module)}
        # the entries' own functions import what they call when they are called
        assert not below or module in ("esol", "esol.cli", "esol.train")
    if name.startswith(("esol/models/", "esol/ops/")):
        assert not tops & {"os", "io", "shutil"} or name == "esol/models/backbones.py"
        assert not {other for other in found if other.startswith(("esol.data", "esol.base.files"))}
    if name == "esol/training/loop.py":
        assert not {other for other in found if other.startswith(("esol.models", "esol.ops"))}
    if name == "esol/data/plan.py":
        assert "torch" not in tops


@pytest.mark.parametrize("command", ["esol.cli", "shards.cli"])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['x', '--help']\n"
        f"try:\n    from {command} import main; main()\nexcept SystemExit as done:\n    assert not done.code\n"
        f"print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "usage:" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("LOADED []"), done.stdout


def test_a_start_loads_no_compiler() -> None:
    """Neither all stages nor a whole job: torch._dynamo is as heavy as torch, and torchvision brings it along."""
    code = (
        "import sys, esol.pipeline.job; from esol.pipeline.registry import table; assert len(table()) > 10\n"
        "print(sorted({'torch._dynamo', 'torchvision', 'timm', 'mlflow', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_no_module_of_esol_is_named_like_a_top_level_package() -> None:
    """Launchers put esol/ itself first on the path, where such a module would shadow the package."""
    taken = set(sys.stdlib_module_names) | {*HEAVY, "numpy", "yaml", "datasets", "evaluate", "PIL", "rich", "fsspec"}
    names = {path.stem for path in (ROOT / "esol").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & taken
