"""Imports run one way: physics, data and distributions, volumes, pose, model, guides, inference, analysis, cli."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pyro_cryo"
RECIPES = ROOT / "models"

LAYERS = {
    "pyro_cryo": 0,
    "pyro_cryo.progress": 0,
    "pyro_cryo.recipes": 0,
    "pyro_cryo.rows": 0,
    "pyro_cryo.physics": 1,
    "pyro_cryo.distributions": 2,
    "pyro_cryo.data": 2,
    "pyro_cryo.volumes": 3,
    "pyro_cryo.pose": 4,
    "pyro_cryo.model": 4,
    "pyro_cryo.guides": 5,
    "pyro_cryo.inference": 6,
    "pyro_cryo.testing": 7,
    "pyro_cryo.analysis": 7,
    "pyro_cryo.cli": 8,
}
TOGETHER = 2  # data and distributions stand side by side: neither needs the other


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_of(path: Path) -> str:
    """The name under which a file of the package or of the recipes is imported."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return "pyro_cryo." + name if path.is_relative_to(RECIPES) else name


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {module_of(p) for p in (*files(PACKAGE), *files(RECIPES))}
            found |= (inner & known) or {str(node.module)}
    return found


def layer_of(module: str) -> int | None:
    """How high a module of the package stands; None for all else."""
    name = module
    while name.startswith("pyro_cryo.") and name not in LAYERS:
        name = name.rpartition(".")[0]
    return LAYERS.get(name) if name != "pyro_cryo" or module == "pyro_cryo" else None


@pytest.mark.parametrize("path", files(PACKAGE), ids=module_of)
def test_a_file_imports_from_its_own_layer_or_below(path: Path) -> None:
    module = module_of(path)
    own = layer_of(module)
    assert own is not None, f"{module} stands in no layer; say in LAYERS where it belongs"
    for name in imports(path):
        if name.split(".")[0] != "pyro_cryo":
            continue
        other = layer_of(name)
        if name == "pyro_cryo.models" or name.startswith("pyro_cryo.models."):
            # a saved run finds its recipe by name; none is known beforehand
            assert own >= LAYERS["pyro_cryo.inference"], f"{module} imports the recipes"
            assert name == "pyro_cryo.models", f"{module} imports the recipe {name}"
            continue
        assert other is not None, f"{module} imports {name}, which stands in no layer"
        assert other <= own, f"{module} imports {name} from above"
        if own == other == TOGETHER:
            assert name.split(".")[1] == module.split(".")[1], f"{module} imports {name} from beside"


@pytest.mark.parametrize("path", files(RECIPES), ids=module_of)
def test_recipes_do_not_import_the_command_line(path: Path) -> None:
    assert not any(name.startswith("pyro_cryo.cli") for name in imports(path))


@pytest.mark.parametrize("path", [*files(PACKAGE / "physics")], ids=module_of)
def test_physics_knows_neither_pyro_nor_files(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"pyro", "pathlib", "os", "mrcfile", "pandas"}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a file with its name as written."""
    tree = ast.walk(ast.parse(path.read_text()))
    return [(ast.unparse(node.func), node) for node in tree if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", [*files(PACKAGE), *files(RECIPES)], ids=module_of)
def test_nothing_is_pickled_and_only_named_classes_are_unpickled(path: Path) -> None:
    for name, call in calls(path):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert name not in ("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "joblib.load"), path
        if name == "torch.load":
            assert ast.unparse(given.get("weights_only", ast.Constant(None))) == "True", f"{path}: torch.load"
        if "allow_pickle" in given:
            assert ast.unparse(given["allow_pickle"]) == "False", f"{path}: allow_pickle"
    if "pickle" in imports(path):
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        restricted = [c for c in classes if "pickle.Unpickler" in map(ast.unparse, c.bases)]
        methods = {f.name for c in restricted for f in c.body if isinstance(f, ast.FunctionDef)}
        assert "find_class" in methods, f"{path} imports pickle without a restricted unpickler"


def test_there_is_something_to_look_at() -> None:
    assert len(files(PACKAGE)) > 30
    assert {"pyro_cryo.models.cryodrgn", "pyro_cryo.models.homogeneous"} <= set(map(module_of, files(RECIPES)))
    assert layer_of("pyro_cryo.data.star") == LAYERS["pyro_cryo.data"]
    assert layer_of("pyro_cryo.nowhere") is None
    assert "pyro_cryo.physics.fourier" in imports(PACKAGE / "physics" / "slices.py") | imports(PACKAGE / "model.py")
