"""Building the package: a wheel with the native kernels, and one without them where they cannot be compiled.

The build runs on copies of the tree. Apart from one build of the kernels themselves, the C++ is a stand-in that
compiles at once and tells how it was compiled.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = "renorm/kernels"  # of the extension
PACKAGE = f"src/{FOLDER}"
STAND_IN = {
    "job.h": "constexpr int kNumber = 1;\n",
    "kernels.cpp": """
#include "job.h"
namespace renorm { namespace RENORM_ISA {
#if defined(__AVX512F__)
int width() { return 512; }
#elif defined(__AVX2__)
int width() { return 256; }
#else
int width() { return 128; }
#endif
} }
""",
    "module.cpp": """
#include <Python.h>
#include "job.h"
namespace renorm {
namespace baseline { int width(); }
#ifdef RENORM_X86
namespace avx2 { int width(); }
namespace avx512 { int width(); }
#endif
}
PyMODINIT_FUNC PyInit__native(void) {
    static PyModuleDef definition = {
        PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    PyObject* module = PyModule_Create(&definition);
    PyModule_AddIntConstant(module, "number", kNumber);
    PyModule_AddIntConstant(module, "baseline", renorm::baseline::width());
#ifdef RENORM_X86
    PyModule_AddIntConstant(module, "avx2", renorm::avx2::width());
    PyModule_AddIntConstant(module, "avx512", renorm::avx512::width());
#endif
    return module;
}
""",
}
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
# A bare machine may lack a compiler; where all tests must run, there has to be one.
needs_compiler = pytest.mark.skipif(
    not os.environ.get("CI") and not shutil.which(os.environ.get("CXX", "c++").split()[0]),
    reason="there is no C++ compiler",
)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the compiler is taken away by CXX, which Unix reads")


def copy(folder):
    """What the package is built from, and no earlier build of it."""
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("src", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "_native*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture
def tree(tmp_path):
    """A copy whose kernels are the stand-in."""
    folder = copy(tmp_path / "tree")
    shutil.rmtree(folder / "csrc")
    (folder / "csrc").mkdir()
    for name, text in STAND_IN.items():
        (folder / "csrc" / name).write_text(text)
    return folder


def python(folder, *arguments, **variables):
    """Run Python in a folder, with only these of the variables that the build reads."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RENORM_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**inherited, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def call(folder, hook, before="", **variables):
    """Call a hook of the build backend, as pip does."""
    return python(folder, "-c", f"{before}\nimport setuptools.build_meta as b\nb.{hook}('dist')", **variables)


def wheel(folder, **variables):
    """Build a wheel; its path, and what was said meanwhile."""
    done = call(folder, "build_wheel", **variables)
    assert done.returncode == 0, done.stdout
    (path,) = (folder / "dist").glob("*.whl")
    return path, done.stdout


def libraries(path):
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if "_native" in name]


def in_tree(folder):
    return list((folder / PACKAGE).glob("_native*"))


def look(folder, expression):
    """Evaluate an expression over the extension `m` that lies in the source tree, without the package or torch."""
    code = (
        "import importlib.util as u, sys\n"
        "s = u.spec_from_file_location('_native', sys.argv[1])\n"
        f"m = u.module_from_spec(s); s.loader.exec_module(m); print({expression})"
    )
    (library,) = in_tree(folder)
    done = python(folder, "-c", code, str(library))
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def install(path, target):
    done = python(target.parent, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(path))
    assert done.returncode == 0, done.stdout


@needs_compiler
def test_a_wheel_with_the_kernels(tmp_path):
    folder = copy(tmp_path / "tree")
    if (ROOT / "build/native").exists():
        # The objects of the installation under test, if they are of these sources and flags: minutes become seconds.
        shutil.copytree(ROOT / "build/native", folder / "build/native")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", "dist")
    done = python(folder, "-m", "pip", "wheel", *options, ".", RENORM_NATIVE="1")
    assert done.returncode == 0, done.stdout
    (path,) = (folder / "dist").glob("*.whl")
    assert "-cp310-abi3-" in path.name
    assert len(libraries(path)) == 1
    install(path, tmp_path / "target")
    code = (
        "import renorm\n"
        "from renorm.kernels import _native\n"
        "print(_native.__file__)\n"
        "print(renorm.kernels.status())\n"
        "import sys, torch\n"
        "torch.ones(1 << 20).exp().sum(), renorm.LayerNorm(64)(torch.randn(4096, 64))\n"
        "maps = open('/proc/self/maps').read().split() if sys.platform == 'linux' else []\n"
        "print('pools:', len({word for word in maps if 'libgomp' in word or 'libomp' in word or 'libiomp' in word}))\n"
    )
    done = python(tmp_path, "-c", code, PYTHONPATH=str(tmp_path / "target"))
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(str(tmp_path / "target"))
    assert "native: not available" not in done.stdout
    if sys.platform == "linux":
        assert "pools: 1" in done.stdout


def test_a_wheel_without_a_compiler(tree, tmp_path):
    # Builds that lie about: in both folders that setuptools packs, and in the source tree for an older Python.
    platform_folder = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for place in (f"build/lib/{FOLDER}", f"build/{platform_folder}/{FOLDER}", PACKAGE):
        (tree / place).mkdir(parents=True, exist_ok=True)
        (tree / place / "_native.abi3.so").write_bytes(b"old")
    (tree / PACKAGE / "_native.cpython-39-x86_64-linux-gnu.so").write_bytes(b"older")
    path, said = wheel(tree, **NO_COMPILER)
    assert path.name.endswith("-py3-none-any.whl")
    assert libraries(path) == in_tree(tree) == []
    assert "building WITHOUT the native kernels: no working C++17 compiler" in said
    install(path, tmp_path / "target")
    code = (
        "import torch, renorm\n"
        "print(renorm.__file__)\n"
        "print(renorm.LayerNorm(8)(torch.randn(4, 8)).shape)\n"
        "print(renorm.kernels.status())"
    )
    done = python(tmp_path, "-c", code, PYTHONPATH=str(tmp_path / "target"))
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(str(tmp_path / "target"))
    assert "native: not available" in done.stdout


def test_kernels_that_are_asked_for_and_cannot_be_built_are_an_error(tree):
    done = call(tree, "build_wheel", RENORM_NATIVE="1", **NO_COMPILER)
    assert done.returncode != 0
    assert "cannot be built: no working C++17 compiler" in done.stdout
    assert not list((tree / "dist").glob("*.whl"))


def test_none_are_built_where_none_are_wanted(tree):
    path, said = wheel(tree, RENORM_NATIVE="0")
    assert path.name.endswith("-py3-none-any.whl")
    assert libraries(path) == []
    assert "RENORM_NATIVE=0 asks for none" in said


def test_a_misspelt_wish_is_an_error(tree):
    done = call(tree, "build_wheel", RENORM_NATIVE="yes")
    assert done.returncode != 0
    assert "RENORM_NATIVE must be 0 or 1, or not set; got 'yes'." in done.stdout


@needs_compiler
def test_sources_that_do_not_compile(tree):
    (tree / "csrc/kernels.cpp").write_text("int broken = ;\n")
    path, said = wheel(tree)
    assert path.name.endswith("-py3-none-any.whl")
    assert "kernels.cpp:1" in said
    assert "Please report" in said
    done = call(tree, "build_wheel", RENORM_NATIVE="1")
    assert done.returncode != 0
    assert "kernels.cpp:1" in done.stdout


@needs_compiler
def test_sanitizers_that_the_compiler_does_not_know_are_an_error(tree):
    done = call(tree, "build_wheel", RENORM_SANITIZE="nonsense")
    assert done.returncode != 0
    assert "cannot be built" in done.stdout


@needs_compiler
def test_an_editable_installation_follows_its_sources(tree):
    def edit():
        done = call(tree, "build_editable", RENORM_NATIVE="1")
        assert done.returncode == 0, done.stdout
        return done.stdout

    # An extension for one Python alone would be imported in place of the one for all.
    (tree / PACKAGE / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"old")
    edit()
    assert in_tree(tree) == [tree / PACKAGE / "_native.abi3.so"]
    assert look(tree, "m.number") == "1"

    before = os.stat(tree / "csrc/job.h")
    (tree / "csrc/job.h").write_text("constexpr int kNumber = 2;\n")
    os.utime(tree / "csrc/job.h", ns=(before.st_atime_ns, before.st_mtime_ns))  # what changed is what counts
    assert "-c csrc/kernels.cpp" in edit()
    assert look(tree, "m.number") == "2"

    assert "-c csrc/" not in edit()  # nothing to compile
    assert look(tree, "m.number") == "2"

    done = call(tree, "build_editable", **NO_COMPILER)
    assert done.returncode == 0, done.stdout
    assert in_tree(tree) == []


@needs_compiler
def test_each_instruction_set_has_its_flags(tree):
    assert call(tree, "build_editable", RENORM_NATIVE="1").returncode == 0
    assert look(tree, "m.baseline") == "128"
    if platform.machine() in ("x86_64", "AMD64") and sys.platform == "linux":
        assert look(tree, "(m.avx2, m.avx512)") == "(256, 512)"
    elif platform.machine() in ("arm64", "aarch64"):
        assert look(tree, "hasattr(m, 'avx2')") == "False"


def test_a_python_without_the_stable_abi_gets_a_pure_wheel(tree):
    pretend = "import sysconfig\nsysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1"
    done = call(tree, "build_wheel", before=pretend)
    assert done.returncode == 0, done.stdout
    (path,) = (tree / "dist").glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    assert "free-threaded" in done.stdout


def test_the_source_distribution_has_the_sources(tree):
    (tree / PACKAGE / "_native.abi3.so").write_bytes(b"old")
    done = call(tree, "build_sdist")
    assert done.returncode == 0, done.stdout
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", *(f"csrc/{name}" for name in STAND_IN)} <= names
    assert not [name for name in names if name.endswith(".so")]
