"""The house: imports run one way, and `import renorm` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import renorm

SOURCE = Path(renorm.__file__).parent
# From the ground up; a module may import from its own storey's files and from those below.
STOREYS = [
    {"errors"},
    {"pattern"},
    {"plan", "drawing"},
    {"kernels"},
    {"norms"},
    {"choices", "measures"},
    {"surgery", "diagnose", "cards"},
    {"comparison"},
    {"studies"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(STOREYS) for name in names}
HEAVY = {
    "plotly",
    "typer",
    "rich",
    "triton",
    "sklearn",
    "pandas",
    "scipy",
    "pydantic",
    "joblib",
    "matplotlib",
    "PIL",
    "pyarrow",
}


def modules():
    return [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


def exists(dotted):
    place = SOURCE.parent / dotted.replace(".", "/")
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def imported(path):
    """The renorm modules a file imports at any level of nesting, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if exists(name) else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name.startswith("renorm"))


def storey(dotted):
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else None


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_down_the_house(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert own in LEVEL, f"{path} stands on no storey: give {own} a place in STOREYS"
    for name in imported(path):
        other = storey(name)
        if other is not None and other != own:
            assert LEVEL[other] < LEVEL[own], (
                f"{path.relative_to(SOURCE)} imports {name}, which stands above or beside it"
            )


def test_no_circles_between_files():
    graph = {}
    for path in modules():
        relative = path.relative_to(SOURCE).with_suffix("")
        name = ".".join(["renorm", *relative.parts]).removesuffix(".__init__")
        graph[name] = {target for target in imported(path) if target != name}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in graph:
            return
        path.append(name)
        for target in sorted(graph[name]):
            visit(target)
        done.add(path.pop())

    for name in sorted(graph):
        visit(name)


def test_importing_renorm_loads_nothing_heavy():
    code = "import sys, renorm; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)


def test_public_names():
    assert set(renorm.__all__) == {
        *("BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "LayerNorm", "Norm", "RMSNorm"),
        *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        *("SwitchNorm", "SwitchNorm1d", "SwitchNorm2d", "SwitchNorm3d"),
        *("BatchRenorm", "GhostBatchNorm", "InPlaceBatchNorm2d", "PowerNorm", "Ramp"),
        *("BatchWhitening", "IterNorm"),
        *("AdaIN", "ConditionalNorm", "CrossNorm", "FiLM", "SPADE", "SelfNorm"),
        *("Derf", "DyT", "EvoNormB0", "EvoNormS0", "FRN", "GlobalResponseNorm", "TLU"),
        *("LayerNorm2d", "LocalResponseNorm", "PositionalNorm", "RevIN", "ScaleNorm"),
        *("LayerNormGRU", "LayerNormLSTM"),
        *("CosineConv1d", "CosineConv2d", "CosineConv3d", "CosineLinear"),
        *("initialize_weight_norm", "spectral_norm", "weight_norm", "weight_standardization"),
        *("centralize_gradients", "clip_gradients_adaptively", "normalize_gradients"),
        *("draw_activation", "draw_trajectory", "loss", "loss_for", "mc_dropout", "summary", "trajectory"),
        *("fold", "freeze", "from_keras", "recalibrate", "swap", "sync", "unfreeze", "unsync"),
        *("Comparison", "check", "compare", "diagnose", "draw", "errors", "explain", "kernels", "watch", "worst_cases"),
    }
    assert all(getattr(renorm, name) is not None for name in renorm.__all__)
    assert set(dir(renorm)) >= set(renorm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'batchnorm'"):
        _ = renorm.batchnorm
