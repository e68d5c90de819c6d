"""Builds renorm.kernels._native, the kernels in C++; without a working compiler the package is pure Python.

The metadata is in pyproject.toml. Three variables of the environment decide what it cannot:

- RENORM_NATIVE=1: kernels that cannot be built are an error; 0: none are built.
- RENORM_SANITIZE=address,undefined: the sanitizers to compile in.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, errors, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

NAME = "renorm.kernels._native"
PACKAGE = Path("src/renorm/kernels")
SOURCES = Path("csrc")
OBJECTS = Path("build/native")
# The oldest Python that the one wheel runs on, as C and as the wheel's tag name it.
LIMITED_API, PYTHON_TAG = "0x030A0000", "cp310"

# Without optimization across objects (LTO, /GL), which could move code for one instruction set into another's.
COMMON = {
    "gnu": [
        *("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden"),
        "-fno-lto",
        # Python's own flags ask for debugging information: 1.4 times the time. Those of a packager stand.
        *([] if "CXXFLAGS" in os.environ else ["-g0"]),
    ],
    "msvc": ["/std:c++17", "/O2", "/EHsc", "/GL-"],
}
MACROS = {
    "gnu": [("Py_LIMITED_API", LIMITED_API)],
    "msvc": [("Py_LIMITED_API", LIMITED_API), ("RENORM_PLAIN_LANES", "1")],  # MSVC has no vector types
}
ISAS = {
    "gnu": {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
            "-mprefer-vector-width=512",
            # GCC 12 and older warn of their own headers (GCC bug 105593); Clang does not know that warning.
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
        ],
    },
    "msvc": {"avx2": ["/arch:AVX2"], "avx512": ["/arch:AVX512"]},
}

PROBE_PYTHON = """
#include <cstdint>
#include <Python.h>
PyMODINIT_FUNC PyInit_probe(void) {
    if constexpr (sizeof(void*) > 0) return nullptr;
}
"""
# Clang has only its own libomp: a second pool of threads beside torch's libgomp, and both wait for each other.
PROBE_OPENMP = """
#include <omp.h>
#ifdef __clang__
#error "no libgomp"
#endif
int probe() {
    int threads = 0;
    #pragma omp parallel num_threads(2)
    threads = omp_get_num_threads();
    return threads;
}
"""
# The flags alone prove little: an old MSVC ignores those it does not know, and a compiler for two processors
# at once (macOS, universal2) has only one that knows them.
PROBE_ISA = {
    "avx2": """
#include <immintrin.h>
#if !(defined(__x86_64__) || defined(_M_X64)) || !defined(__AVX2__)
#error "not x86-64 with AVX2"
#endif
__m256 probe(__m256 a, __m128i b) { return _mm256_fmadd_ps(a, a, _mm256_cvtph_ps(b)); }
""",
    "avx512": """
#include <immintrin.h>
#if !(defined(__x86_64__) || defined(_M_X64)) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "not x86-64 with AVX-512"
#endif
__m512i probe(const void* a) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(1, a)); }
""",
}

# What a compiler that is missing, broken or too old raises.
FAILURES = (errors.CCompilerError, errors.ExecError, errors.PlatformError, OSError)


class Unavailable(Exception):
    """The native kernels cannot be built here, for the reason given."""


class Unit(NamedTuple):
    """One object file: what it is compiled from and with."""

    label: str
    source: Path
    flags: list[str]
    macros: list[tuple[str, str]]


class Toolchain(NamedTuple):
    """What the compiler at hand can do."""

    isas: list[str]  # beyond the baseline
    compile_flags: list[str]  # of every object
    link_flags: list[str]


def complaint(action: Callable[[], object]) -> str:
    """What `action` fails with, and what its compilers print then; empty where it succeeds.

    Compilers write to the file descriptors, which sys.stdout does not know about.
    """
    said = ""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = {number: os.dup(number) for number in (1, 2)}
        try:
            for number in saved:
                os.dup2(file.fileno(), number)
            action()
        except FAILURES as error:
            said = str(error)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)
        file.seek(0)
        return file.read().decode(errors="replace") + said if said else ""


def wish(name: str, allowed: tuple[str, ...]) -> str:
    """A variable of the environment that may have some values only."""
    value = os.environ.get(name, "")
    if value not in ("", *allowed):
        raise SystemExit(f"{name} must be {' or '.join(allowed)}, or not set; got {value!r}.")
    return value


def no_stable_abi() -> str:
    """Why this Python cannot load an extension built for the stable ABI; empty where it can."""
    if sys.implementation.name != "cpython":
        return f"the kernels are built for CPython, and this is {sys.implementation.name}"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "the kernels are built for the stable ABI (abi3), which a free-threaded Python does not have"
    return ""


def discard(folders: Iterable[Path]) -> None:
    """Delete built extensions: an old one would be packed or imported in place of what is built now."""
    for folder in folders:
        for pattern in ("_native*.so", "_native*.pyd"):
            for path in folder.glob(pattern):
                path.unlink()


class BuildNative(build_ext):
    """Compiles every object with its own flags; where that fails, the package has no extension."""

    def finalize_options(self) -> None:
        """Settle the options."""
        super().finalize_options()
        self.force = True  # times of files say nothing of flags; `compiled` knows what can be kept

    def run(self) -> None:
        """Build the extension, or the package without it."""
        if not self.extensions:
            return
        discard(path / "renorm/kernels" for path in (Path(self.build_lib), *Path("build").glob("lib*")))
        try:
            if wish("RENORM_NATIVE", ("0", "1")) == "0":
                raise Unavailable("RENORM_NATIVE=0 asks for none")
            if reason := no_stable_abi():
                raise Unavailable(reason)
            if self.inplace:
                discard([PACKAGE])
            super().run()
        except Unavailable as error:
            self.do_without(str(error))
        except FAILURES as error:
            print(error, file=sys.stderr, flush=True)
            self.do_without(
                "the compiler is there but failed, with the messages above. Please report them as an issue of renorm, "
                "with the compiler's version"
            )

    def do_without(self, reason: str) -> None:
        """Turn the package into a pure one, or stop where the kernels were asked for."""
        if os.environ.get("RENORM_NATIVE") == "1" or os.environ.get("RENORM_SANITIZE"):
            raise SystemExit(
                f"renorm: RENORM_NATIVE=1 or RENORM_SANITIZE asks for native kernels, which cannot be built: {reason}"
            )
        print(
            f"renorm: building WITHOUT the native kernels: {reason}\n"
            "renorm: it works all the same, in plain torch, but slower. RENORM_NATIVE=1 makes this an error.",
            file=sys.stderr,
            flush=True,
        )
        discard([PACKAGE])
        self.extensions = []
        self.distribution.ext_modules = None

    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels once for each instruction set, all at the same time, and link them."""
        toolchain = self.toolchain()
        macros = [*MACROS[self.style()], *([("RENORM_X86", "1")] if toolchain.isas else [])]
        variants = ISAS[self.style()]
        # The widest first: it takes longest.
        units = [
            Unit(
                isa,
                SOURCES / "kernels.cpp",
                [*variants.get(isa, []), *toolchain.compile_flags],
                [*macros, ("RENORM_ISA", isa)],
            )
            for isa in (*reversed(toolchain.isas), "baseline")
        ]
        units.append(Unit("module", SOURCES / "module.cpp", toolchain.compile_flags, macros))
        OBJECTS.mkdir(parents=True, exist_ok=True)
        folders = {unit.label: OBJECTS / f"{unit.label}-{self.fingerprint(unit)}" for unit in units}
        with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda unit: self.compiled(unit, folders[unit.label]), units))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=self.get_libraries(ext),
            export_symbols=self.get_export_symbols(ext),
            extra_postargs=toolchain.link_flags,
            build_temp=str(OBJECTS),
            target_lang="c++",
        )
        for old in set(OBJECTS.iterdir()) - set(folders.values()):
            shutil.rmtree(old) if old.is_dir() else old.unlink()

    def style(self) -> str:
        """How the compiler's options are written."""
        return "msvc" if self.compiler.compiler_type == "msvc" else "gnu"

    def toolchain(self) -> Toolchain:
        """Find out what the compiler can do, by compiling."""
        style = self.style()
        flags, link_flags = list(COMMON[style]), []
        if sanitizers := os.environ.get("RENORM_SANITIZE"):
            flags += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g1", "-O1"]
            link_flags += [f"-fsanitize={sanitizers}", "-g"]
        if said := self.probe(PROBE_PYTHON, flags, link_flags):
            raise Unavailable(f"no working C++17 compiler, or no Python.h (python3-dev):\n{said.strip()}\n")
        # On macOS and Windows torch brings an OpenMP that compilers there cannot be told to share.
        if sys.platform == "linux":
            if self.probe(PROBE_OPENMP, [*flags, "-fopenmp"], [*link_flags, "-fopenmp"]):
                print("renorm: the compiler has no libgomp: the kernels will use one thread")
            else:
                flags, link_flags = [*flags, "-fopenmp"], [*link_flags, "-fopenmp"]
        isas = ISAS[style]
        # GCC does not align the stack of Windows for such vectors (its bug 54412).
        known = all(not self.probe(PROBE_ISA[isa], [*isas[isa], *flags]) for isa in isas)
        aligned = self.compiler.compiler_type != "mingw32"
        return Toolchain(list(isas) if known and aligned else [], flags, link_flags)

    def probe(self, code: str, flags: list[str], link_flags: list[str] | None = None) -> str:
        """What the compiler objects to in `code`, and the linker where its flags are given; empty for nothing."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(code)

            def build() -> None:
                objects = self.compiler.compile(
                    [str(source)],
                    output_dir=folder,
                    macros=MACROS[self.style()],
                    extra_postargs=flags,
                )
                if link_flags is not None:
                    library = str(Path(folder, "probe.so"))
                    self.compiler.link_shared_object(objects, library, extra_postargs=link_flags, target_lang="c++")

            return complaint(build)

    def fingerprint(self, unit: Unit) -> str:
        """Everything an object depends on, as a name: the same name is the same object."""
        command = getattr(self.compiler, "compiler_so_cxx", None)  # MSVC has its version in the path of `cc`
        version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout if command else b""
        parts: list[Any] = [unit, command or getattr(self.compiler, "cc", None), version, sys.version]
        parts += [self.compiler.include_dirs, sysconfig.get_platform()]
        variables = ("CPATH", "CPLUS_INCLUDE_PATH", "INCLUDE", "SDKROOT", "MACOSX_DEPLOYMENT_TARGET")
        parts += [os.environ.get(name) for name in variables]
        parts += [(path.name, path.read_bytes()) for path in (unit.source, *sorted(SOURCES.glob("*.h")))]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def compiled(self, unit: Unit, folder: Path) -> str:
        """Compile a unit's object into `folder`, or take the one that is there."""
        if not folder.exists():
            # Moved there when it is whole: a build that was interrupted leaves no half of an object.
            with tempfile.TemporaryDirectory(dir=OBJECTS) as scratch:
                whole = Path(scratch, "whole")
                self.compiler.compile(
                    [str(unit.source)],
                    output_dir=str(whole),
                    macros=unit.macros,
                    extra_postargs=unit.flags,
                )
                whole.rename(folder)
        return str(self.compiler.object_filenames([str(unit.source)], output_dir=str(folder))[0])


class BuildWheel(bdist_wheel):
    """Tags the wheel by what was built, not by what was planned."""

    def run(self) -> None:
        """Build and pack."""
        for old in Path("build").glob("lib*"):  # setuptools packs all that lies there, deleted modules too
            shutil.rmtree(old)
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        self.reinitialize_command("build", reinit_subcommands=True)  # a pure package is built in another folder
        super().run()


class BuildEditable(editable_wheel):
    """As BuildWheel, for pip install -e."""

    def run(self) -> None:
        """Build in the source tree."""
        self.run_command("build_ext")
        super().run()


extension = Extension(
    NAME,
    sources=[(SOURCES / name).as_posix() for name in ("kernels.cpp", "module.cpp")],
    depends=sorted(path.as_posix() for path in SOURCES.glob("*.h")),
    language="c++",
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": BuildWheel, "editable_wheel": BuildEditable},
    # setuptools refuses the tag where there is no stable ABI.
    options={} if no_stable_abi() else {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
)
