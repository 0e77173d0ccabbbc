"""The house stands as designed: floors, no data set's name in code, public names, size of modules, fast help."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import medseg

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "medseg"

PARTS = {"transforms", "losses", "metrics", "networks"}
PROGRAMS = {"training", "prediction", "evaluation", "comparison", "report", "export", "phantom"}
# Floor 4 has an order of its own: what reads files lies below what makes cases of them, and so on.
SERVICES = ["files", "volumes", "run", "data", "cache", "checkpoint", "inference", "engine"]
FLOORS = {
    0: {"errors"},
    1: PARTS,
    2: {"component"},
    3: {"config"},
    4: {"files", "volumes", "distributed", "run", "data", "cache", "checkpoint", "inference", "engine"},
    5: {"handlers"},
    6: PROGRAMS,
    7: {"cli"},
}
# Modules split off to keep files short stand on the floor of the module whose name they begin with (volumes_dicom is
# volumes). Those with a name of their own stand here, with what they are.
EXTRA: dict[str, tuple[int, str]] = {
    "precision": (0, "how far torch rounds fp32, for whoever computes"),
    "schedules": (1, "learning-rate schedules: plain arguments, like the other parts"),
    "splitting": (4, "cases -> folds, for data"),
    "sampling": (4, "folds -> samples, for data"),
    "checking": (4, "every problem of a data set, for `data check`"),
    "entry": (4, "an entry for datasets.yaml from a look at files, for `data add`"),
    "fetching": (4, "downloads, for `data fetch`"),
    "patches": (4, "patches out of stored cases"),
    "augmentation": (4, "transforms of one patch, with its own random numbers"),
    "batches": (4, "patches -> batches"),
    "hardware": (4, "device, precision, threads, memory"),
    "package": (4, "a trained model as safetensors and JSON, read and written"),
    "cohort": (4, "many cases read, predicted and written at the same time"),
    "processes": (4, "processes that do not run the caller's script again"),
    "tables": (4, "cases.csv and summary.json, read and written"),
    "views": (4, "small pictures of cases, which evaluation writes and the report shows"),
    "waiting": (4, "a bar or lines on standard error while many cases are worked on"),
    "doctor": (6, "a program: what this machine offers"),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The name on the floor plan: the package for a part, the module itself otherwise."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def floor(name: str) -> int | None:
    for number, names in FLOORS.items():
        if any(name == n or name.startswith(n + "_") for n in names):
            return number
    return next((number for n, (number, _) in EXTRA.items() if name == n or name.startswith(n + "_")), None)


def imports(path: Path) -> set[str]:
    """Units of medseg that a module imports, at any depth (a lazy import is an import all the same)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
            if node.module == "medseg":
                names = [f"medseg.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("medseg.")}
    return found - {"__version__", unit(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_floors(path):
    name = unit(path)
    if name in ("__init__", "__main__", "resources"):
        return
    own = floor(name)
    assert own is not None, f"{name} stands on no floor: add it to FLOORS or EXTRA with a reason"
    for other in imports(path):
        assert floor(other) is not None, f"{path.name} imports {other}, which stands on no floor"
        if own == floor(other):
            assert name not in PARTS, f"parts do not import one another: {path.name} -> {other}"
            same_family = name.split("_")[0] == other.split("_")[0]
            assert own in (1, 3, 4) or same_family, f"programs do not import one another: {path.name} -> {other}"
        else:
            assert floor(other) < own, f"{path.name} (floor {own}) imports {other} (floor {floor(other)})"


def test_services_do_not_import_in_circles():
    edges: dict[str, set[str]] = {}
    for path in modules():
        if floor(unit(path)) == 4:
            edges.setdefault(unit(path), set()).update(other for other in imports(path) if floor(other) == 4)
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, "circle: " + " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    for low, high in itertools.pairwise(SERVICES):
        assert high not in edges.get(low, set()), f"{low} lies below {high}"


def test_no_data_sets_name_is_in_the_code():
    names = set(yaml.safe_load((ROOT / "datasets.yaml").read_text(encoding="utf-8")))
    # words of the field that are also names of sets: they may be written in prose about organs and shapes
    common = {"liver", "lung", "shapes", "cell", "drive"}
    for path in modules():
        if path.name.startswith("phantom"):  # they draw the sets that they are named after
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):  # `if dataset == "liver"` in any of its forms
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        assert part.value not in names | common, (
                            f"{path.name}:{node.lineno} compares with {part.value!r}"
                        )
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                assert node.value not in names - common, f"{path.name}:{node.lineno} names {node.value!r}"


def test_public_names_are_real_and_documented():
    expected = {
        "train", "predict", "evaluate", "compare", "load_pipeline", "load_model", "export_bundle", "export_onnx",
        "export_package", "MedsegError", "__version__",
    }  # fmt: skip
    assert set(medseg.__all__) == expected
    for name in expected:
        value = getattr(medseg, name)
        assert value is not None
        if name != "__version__":
            assert callable(value)
            assert value.__doc__, f"medseg.{name} has no docstring"
            assert not (PACKAGE / f"{name}.py").exists(), f"a module hides medseg.{name} when it is imported"
    with pytest.raises(AttributeError):
        _ = medseg.no_such_name


@pytest.mark.parametrize("package", [*sorted(PARTS), "inference"])
def test_every_public_part_exists_and_has_a_docstring(package):
    module = __import__(f"medseg.{package}", fromlist=["__all__"])
    assert module.__all__ == sorted(module.__all__, key=str) or len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert value.__doc__, f"medseg.{package}.{name} has no docstring"


def test_modules_are_short():
    for path in modules():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 300, f"{path.relative_to(ROOT)} has {lines} lines"


HEAVY = {"torch", "monai", "SimpleITK", "scipy", "matplotlib"}


@pytest.mark.parametrize(
    ("command", "heavy"),
    [
        (["--help"], {*HEAVY, "numpy", "pydicom", "nibabel", "pydantic", "yaml"}),
        (["data", "list", "--data", "."], HEAVY),  # it looks at no image
    ],
)
def test_light_commands_import_nothing_heavy(command, heavy):
    script = (
        "import sys, medseg.cli as c\n"
        f"try: c.main({command})\n"
        "except SystemExit: pass\n"
        f"print(sorted({{m.split('.')[0] for m in sys.modules}} & {heavy}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip().splitlines()[-1] == "[]"


def test_no_version_differs():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    assert match
    assert match[1] == medseg.__version__


def test_doctor_knows_every_extra():
    import tomllib

    from medseg.doctor import EXTRAS

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    del extras["dev"]
    assert {name: tuple(re.split("[<>=]", need)[0] for need in needs) for name, needs in extras.items()} == EXTRAS


def test_every_promise_of_the_reliability_page_has_tests_that_exist():
    from reliability_rows import ROWS, node

    defined = {
        (path.name, part.name)
        for path in (ROOT / "tests").glob("test_*.py")
        for part in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(part, ast.FunctionDef)
    }
    missing = {f"{name}: {test}" for name, row in ROWS.items() for test in row.tests if node(test) not in defined}
    assert not missing
    assert all(row.tests for row in ROWS.values())
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for name, row in ROWS.items():
        assert f"| {name} | {row.text} |" in page, "write the table again: see tests/reliability_rows.py"


def test_every_error_code_is_described():
    """In docs/errors.md, which says that it has all of them."""
    raised = {code for path in modules() for code in re.findall(r'"(E\d{3})"', path.read_text(encoding="utf-8"))}
    described = set(re.findall(r"^\| (E\d{3}) ", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert raised - described == set()
