"""What keeps the code easy to change: short files, layers, no circles, and nobody who asks for a type."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ("adapters", "policies", "rl", "recipes")  # each may import those before it
LONGEST = 350
# Names of kinds that only their own folder may compare with.
ALGORITHMS = {"dsrl_sac", "dsrl_na", "best_of_n", "golden_ticket", "residual"}
ENVIRONMENTS = {"metaworld_state", "libero", "libero_chunks"}


@cache
def sources():
    """Syntax tree of every module of the four packages, by dotted name below `trimtab`."""
    trees = {}
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            trees[name] = path, ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imports(tree, everywhere=True):
    """Dotted names below `trimtab` that a module imports; of a function's body only `everywhere`."""
    names, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("trimtab.") for alias in node.names if "trimtab." in alias.name}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimtab."):
            module = node.module.removeprefix("trimtab.")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                names.add(inner if inner in sources() else module)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


def test_no_file_is_longer_than_one_job_needs():
    lines = {name: path.read_text(encoding="utf-8").count("\n") for name, (path, _) in sources().items()}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


def test_imports_point_one_way():
    wrong = [
        f"{name} imports {imported}"
        for name, (_, tree) in sources().items()
        for imported in imports(tree)
        if LAYERS.index(imported.split(".")[0]) > LAYERS.index(name.split(".")[0])
    ]
    assert not wrong


def test_no_two_files_import_each_other():
    graph = {name: imports(tree, everywhere=False) for name, (_, tree) in sources().items()}
    reached = {}
    for name in graph:
        waiting, reached[name] = [name], set()
        while waiting:
            for imported in graph.get(waiting.pop(), set()) - reached[name]:
                reached[name].add(imported)
                waiting.append(imported)
    assert not {name for name in graph if name in reached[name]}


def test_no_import_hides_behind_type_checking():
    hidden = {name for name, (path, _) in sources().items() if "TYPE_CHECKING" in path.read_text()}
    assert not hidden


def test_test_modules_share_through_helpers_only():
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(part.startswith("test_") for name in names for part in name.split(".")[:-1]):
                wrong.append(str(path.relative_to(ROOT / "tests")))
    assert not wrong


def names_in(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def type_questions(tree, owners, kinds):
    """Lines of a module where it compares an owner's `.type`, or anything with one of `kinds`."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [item for side in sides for item in getattr(side, "elts", ())]
            named = {ast.unparse(side) for side in sides}
            constants = {side.value for side in sides if isinstance(side, ast.Constant)}
            if constants & kinds or any(name.endswith(f"{owner}.type") for name in named for owner in owners):
                lines.append(f"{node.lineno}: {ast.unparse(node)}")
    return lines


def test_only_environments_ask_for_an_environments_type():
    owners = ("env", "env_config", "environment")
    wrong = {
        name: lines
        for name, (_, tree) in sources().items()
        if not name.startswith(("rl.envs", "adapters.lerobot"))
        and (lines := type_questions(tree, owners, ENVIRONMENTS))
    }
    assert not wrong


def test_only_algorithms_ask_for_an_algorithms_type():
    classes = {
        node.name
        for name, (_, tree) in sources().items()
        if name.startswith("rl.algorithms")
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    wrong = {}
    for name, (_, tree) in sources().items():
        if name.startswith("rl.algorithms"):
            continue
        lines = type_questions(tree, ("rl", "algorithm", "method"), ALGORITHMS)
        for node in ast.walk(tree):
            called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if called in ("isinstance", "issubclass") and classes & names_in(node.args[1]):
                lines.append(f"{node.lineno}: {ast.unparse(node)}")
        if lines:
            wrong[name] = lines
    assert not wrong
