"""Plants mistakes in the CUDA kernels, one at a time, and asks whether the tests on the emulator notice.

`python tests/support/mutate.py backward|forward|siblings [--jobs N] [--only TEXT]`, with cmake, ninja and pybind11 at hand. Each
wait, barrier and predicate (or, of several joined by &&, each of them) of the sources is dropped in turn; for siblings, what tells
where one mixture's columns stand beside another's. The module is built with that mistake for bfloat16, and if no quick test of that
type notices, for float32. Prints what survives, and ends with an error if that is not in `HARMLESS`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = {
    "backward": ("backward_params.cuh", "grad_output_pass.cuh", "gate_backward.cuh", "grad_input_pass.cuh"),
    "forward": ("shrink.cuh", "expand.cuh", "forward.cuh"),
    "siblings": ("shrink.cuh", "forward.cuh", "gate_backward.cuh", "grad_input_pass.cuh", "gates.cuh"),
}
# For siblings: code, and what stands there instead.
PLACES = (
    ("p.first_column + 8 * (tile", "8 * (tile"),
    ("tile + p.router_gap", "tile"),
    ("const int columns = p.columns,", "const int columns = 8 * (p.expert_tiles + p.router_tiles),"),
    ("p.open_part * all + tile16", "tile16"),
    ("pitch = p.D_pitch;", "pitch = 16 * (p.expert_groups + p.router_groups);"),
    ("+ p.D_first + 8 * tile", "+ 8 * tile"),
    ("+ p.D_router + n", "+ 16 * p.expert_groups + n"),
    ("part < p.open_parts", "part < 1"),
    ("router ? p.first_router : p.first_A", "router ? p.first_router : 0"),
    ("router ? p.first_router : p.first_A", "router ? p.first_router - p.first_A : p.first_A"),
    ("row >= p.rows_A;", "row >= p.R;"),
    ("of_router ? p.first_router : p.first_row", "of_router ? p.first_router : 0"),
    ("of_router ? p.first_router : p.first_row", "of_router ? p.first_row : p.first_row"),
    ("from_row < (of_router ? p.N : p.R)", "true"),
    # masks of their own: one for all, exchanged, and another one's
    ("load(p.seed + (first_mask + i))", "load(p.seed)"),
    ("load(p.seed + (first_mask + i))", "load(p.seed + (first_mask + masks - 1 - i))"),
    ("mask_of(tile, i)", "mask_of(tile, masks - 1 - i)"),
    ("mask_of(tile, own)", "mask_of(tile)"),
    ("mask_of(tile, p.expert[16 * group])", "mask_of(tile)"),
    ("if (own != seen) {", "if (seen == kNoMask) {"),
    ("if (own != seen) {", "if (own != kNoMask) {"),
    ("tile % 2 * masks + mask", "tile % 2 + mask"),
    ("tile % 2 * masks + mask", "tile % 2 * masks"),
    ("masks_of<kMine>(p, tile0, 8,", "masks_of<kMine>(p, first_tile, 8,"),
    ("masks_of<kGroups>(p, group0, 16,", "masks_of<kGroups>(p, 0, 16,"),
    ("p.expert[8 * (end - 1)] - first_mask + 1", "1"),
    ("p.expert[16 * (end - 1)] - first_mask + 1", "1"),
)
TESTS = {
    "backward": ("tests/rode_kernels/backends/cuda/test_backward.py",),
    "forward": ("tests/rode_kernels/backends/cuda/test_forward.py",),
    "siblings": ("tests/rode_kernels/backends/cuda/test_siblings.py",),
}
# The translation unit of csrc/emulator that has a source, where it is not the kernels' that are asked for.
UNITS = {
    "shrink.cuh": "forward",
    "forward.cuh": "forward",
    "gates.cuh": "gates",
    "gate_backward.cuh": "backward",
    "grad_input_pass.cuh": "backward",
}
TYPES = {"bf16": "bfloat16", "float": "float32"}
# Mistakes that change nothing, (line of code, what is dropped) -> why.
HARMLESS = {
    (
        "const float gate = load(gates + (row * p.N + expert), inside);",
        "inside",
    ): "columns from R on have u = 0, rows from M on are not stored: a step of zeros may count as open",
}


@dataclass(frozen=True)
class Mutation:
    file: str
    line: int
    text: str  # the line of code
    dropped: str
    source: str  # the whole file, with the mistake

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: without `{self.dropped}`: {self.text}"


def closing(source: str, start: int) -> int:
    """The end of the bracket that opens at `start`."""
    depth = 0
    for i in range(start, len(source)):
        depth += (source[i] in "([{") - (source[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError("no end")


def parts(source: str, start: int, end: int, separator: str) -> list[tuple[int, int]]:
    """Parts of source[start:end] between separators outside of brackets, without blanks around them."""
    found, depth, first = [], 0, start
    for i in range(start, end + 1):
        if i < end:
            depth += (source[i] in "([{") - (source[i] in ")]}")
        if i == end or (depth == 0 and source.startswith(separator, i)):
            text = source[first:i]
            found.append((first + len(text) - len(text.lstrip()), first + len(text.rstrip())))
            first = i + len(separator)
    return found


def misplaced(file: str, source: str) -> Iterator[Mutation]:
    """The mistakes of `PLACES`."""
    for text, instead in PLACES:
        if (at := source.find(text)) >= 0:
            line = source.count("\n", 0, at)
            wrong = source[:at] + instead + source[at + len(text) :]
            yield Mutation(file, line + 1, source.splitlines()[line].strip(), text, wrong)


def mutations(file: str, source: str) -> Iterator[Mutation]:
    def without(start: int, end: int, instead: str) -> Mutation:
        line = source.count("\n", 0, start)
        return Mutation(
            file,
            line + 1,
            source.splitlines()[line].strip(),
            source[start:end],
            source[:start] + instead + source[end:],
        )

    for found in re.finditer(r"(cp_async_wait<[^;]*>|sync_threads|sync_warp)\(\);", source):
        yield without(found.start(), found.end(), "")
    # the same places, without commas that separate no arguments
    plain = re.sub(
        r"\bvec<\w+, \d+>", lambda m: m.group().replace(",", ";").replace("<", "_").replace(">", "_"), source
    )
    for found in re.finditer(r"\b(load|store)(<[^()]*?>)?\(|\bRow<T>\{", plain):
        end = closing(plain, found.end() - 1)
        arguments = parts(plain, found.end(), end, ",")
        if (
            len(arguments) != {"load": 2, "store": 3, None: 2}[found.group(1)]
            or "RODE_DEVICE" in source[found.start() - 80 : found.start()]
        ):
            continue
        for start, stop in parts(plain, *arguments[-1], "&&"):
            yield without(start, stop, "true")


class Builder:
    """Builds the emulated module with other sources for bfloat16; everything else is built once."""

    def __init__(self, which: str, folder: Path):
        self.folder, self.which = folder, which
        build = folder / "build"
        import pybind11

        run(
            *(
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                "-DCMAKE_BUILD_TYPE=Release",
                "-DRODE_EMULATE=ON",
            ),
            *(
                f"-DPython_EXECUTABLE={sys.executable}",
                "-DPYBIND11_FINDPYTHON=ON",
                "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            ),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        run("ninja", "-C", str(build), "_cuda_emulated")
        self.build = build
        commands = json.loads((build / "compile_commands.json").read_text())
        self.compile = {
            (unit, kind): next(
                c
                for c in commands
                if c["file"].endswith(f"emulator/{unit}.cpp") and f"rode_emulated_{kind}" in c["command"]
            )
            for unit in ("forward", "backward", "gates")
            for kind in TYPES
        }
        link = subprocess.run(
            ["ninja", "-C", str(build), "-t", "commands", "_cuda_emulated"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        self.link = link.strip().splitlines()[-1]

    def __call__(self, mutation: Mutation, kind: str, number: int) -> Path:
        folder = self.folder / f"{number}-{kind}"
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        (folder / "csrc/cuda" / mutation.file).write_text(mutation.source)
        unit = UNITS[mutation.file] if self.which == "siblings" else self.which
        arguments = shlex.split(self.compile[unit, kind]["command"])
        object_ = arguments[arguments.index("-o") + 1]
        arguments[arguments.index("-o") + 1] = str(folder / "object.o")
        arguments[arguments.index(self.compile[unit, kind]["file"])] = str(
            folder / f"csrc/emulator/{unit}.cpp"
        )
        run(*arguments, cwd=self.build)
        module = folder / "module.so"
        link = self.link.split("&&")
        command = next(part for part in link if " -o " in part)
        arguments = [str(folder / "object.o") if a == object_ else a for a in shlex.split(command)]
        arguments[arguments.index("-o") + 1] = str(module)
        run(*arguments, cwd=self.build)
        return module


def run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ...: {(done.stdout + done.stderr)[-2000:]}")


RUN_TESTS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("rode_kernels._cuda_emulated", sys.argv[1])
sys.modules["rode_kernels._cuda_emulated"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import pytest
from rode_kernels.backends.cuda import emulated as cuda_emulated
assert cuda_emulated.native is module
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", *sys.argv[2:]]))
"""


def noticed(module: Path, which: str, kind: str) -> bool:
    """Whether a test fails on it (or hangs)."""
    tests = [*TESTS[which], "-k", f"{TYPES[kind]} or not torch"]
    try:
        done = subprocess.run(
            [sys.executable, "-c", RUN_TESTS, str(module), *tests],
            cwd=ROOT,
            env={**os.environ, "RODE_EMULATE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=SOURCES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="mutations whose description has this text")
    options = parser.parse_args()
    find = misplaced if options.which == "siblings" else mutations
    all_ = [
        m
        for file in SOURCES[options.which]
        for m in find(file, (ROOT / "csrc/cuda" / file).read_text())
        if options.only in str(m)
    ]
    with tempfile.TemporaryDirectory() as folder:
        build = Builder(options.which, Path(folder))

        def survives(numbered: tuple[int, Mutation]) -> bool:
            number, mutation = numbered
            caught = any(noticed(build(mutation, kind, number), options.which, kind) for kind in TYPES)
            print(f"{'noticed ' if caught else 'SURVIVES'} {mutation}", flush=True)
            return not caught

        with ThreadPoolExecutor(options.jobs) as pool:
            survivors = [
                m for m, lives in zip(all_, pool.map(survives, enumerate(all_)), strict=True) if lives
            ]
    unknown = [m for m in survivors if (m.text, m.dropped) not in HARMLESS]
    caught, harmless = len(all_) - len(survivors), len(survivors) - len(unknown)
    print(f"{len(all_)} mistakes, {caught} noticed, {harmless} harmless, {len(unknown)} missed")
    for m in unknown:
        print(f"missed: {m}")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
