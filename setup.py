"""Builds the native CPU kernels (src/kvarn/kernels/cpu) into one shared library; everything else is in pyproject.toml.

The library speaks torch's stable ABI, so one build serves every torch from 2.10 on. It is not a Python module: it
registers operators with torch when `kvarn.kernels` loads it. Without torch or a C++ compiler the package is installed
without it and runs on the reference kernels.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/kvarn/kernels/cpu")
TORCH_SOURCES = [
    "attention_plan.cpp", "attention_views.cpp", "llama.cpp", "ops_attention.cpp", "ops_linear.cpp", "ops_llama.cpp",
    "ops_restore.cpp", "ops_rowwise.cpp", "ops_sampling.cpp", "team.cpp", "tensors.cpp", "variants.cpp",
]  # fmt: skip
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma"]
VNNI = [*AVX512, "-mavx512vnni"]
X86_VARIANTS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_vnni": VNNI,
    "avx512_bf16": [*VNNI, "-mavx512bf16"],
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
# The oldest torch whose stable ABI the library uses.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


class BuildKernels(build_ext):
    """Compiles kernels.cpp once per instruction set and links all objects into kvarn/kernels/_cpu.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        in_tree = SOURCES.parent / "_cpu.so"
        if not self.force and up_to_date(in_tree):
            if in_tree.resolve() != target.resolve():
                put(in_tree, target)
            return
        try:
            build(target, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            without_kernels(f"the C++ compiler failed: {error}")
            self.extensions = []

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.exists():
                put(built, SOURCES.parent / "_cpu.so")


def up_to_date(library: Path) -> bool:
    inputs = [*SOURCES.iterdir(), Path("setup.py")]
    return library.exists() and all(path.stat().st_mtime <= library.stat().st_mtime for path in inputs)


def build(target: Path, objects: Path) -> None:
    torch_root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])  # type: ignore[union-attr,index]
    compiler = os.environ.get("CXX", "g++")
    objects.mkdir(parents=True, exist_ok=True)
    variants = {"portable": []} | (X86_VARIANTS if platform.machine() in ("x86_64", "AMD64") else {})
    include = ["-isystem", str(torch_root / "include"), TORCH_TARGET]
    jobs = [(source, Path(source).stem, include) for source in TORCH_SOURCES]
    jobs += [("kernels.cpp", name, [f"-DKVARN_VARIANT={name}", *flags]) for name, flags in variants.items()]

    def compile_one(job: tuple[str, str, list[str]]) -> str:
        source, stem, flags = job
        out = str(objects / f"{stem}.o")
        subprocess.run([compiler, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", out], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = list(pool.map(compile_one, jobs))
    linked = objects / "_cpu.so"
    link = ["-shared", f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(linked)]
    subprocess.run([compiler, *outputs, *link], check=True)
    put(linked, target)


def put(library: Path, target: Path) -> None:
    """Copies under another name, then renames: a process that runs the old library keeps it instead of crashing."""
    new = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(library, new)
    new.replace(target)


def without_kernels(reason: str) -> None:
    print(f"\nkvarn: building WITHOUT native CPU kernels, the slow reference will run: {reason}\n", file=sys.stderr)


def extensions() -> list[Extension]:
    if importlib.util.find_spec("torch") is None:
        without_kernels("torch is not installed here; install it first and use --no-build-isolation")
        return []
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        without_kernels("no C++ compiler found; install g++ or set CXX")
        return []
    return [Extension("kvarn.kernels._cpu", sources=[str(SOURCES / "kernels.cpp")])]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
