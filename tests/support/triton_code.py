"""What Triton makes of its kernels for GPUs that are not here: the launches of real calls, recorded, and compiled ahead of time.

Run as a program, for the interpreter must be off: `python tests/support/triton_code.py TYPE TARGET...` prints one JSON object a
compiled kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

TARGETS = {
    **{f"sm_{cc}": ("cuda", cc, 32) for cc in (80, 89, 90, 100, 120)},
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
TYPES = {"bf16": torch.bfloat16, "f16": torch.half, "float": torch.float32}


@dataclass
class Launch:
    """One launch that a call makes."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """Stands in a kernel's place, and keeps what it would have been launched with."""

    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        def record(*args, **kwargs) -> None:
            names = [p.name for p in self.kernel.params]
            options = {n: kwargs.pop(n) for n in ("num_warps", "num_stages") if n in kwargs}
            self.launches.append(
                Launch(self.kernel, grid, {**dict(zip(names, args, strict=False)), **kwargs}, options)
            )

        return record


def record(
    dtype: torch.dtype,
    *,
    tokens: int,
    K: int = 4096,
    O: int = 4096,
    ranks: tuple[int, ...] = (2, 4, 8, 16),
    dropout_p: float = 0.0,
    multiprocessors: int = 108,
    inplace: bool = False,
    amd: bool = False,
    config: dict | None = None,
) -> list[Launch]:
    """The launches of one forward and one backward call, from tensors without memory."""
    from rode_kernels.mixture import make_mixture
    from rode_kernels.triton import backward_kernels, forward_kernels, launch, tune

    launches: list[Launch] = []
    kernels = [(forward_kernels, n) for n in ("fused", "shrink", "expand")]
    kernels += [(backward_kernels, n) for n in ("through_y", "through_v", "weights", "add")]
    before = [(module, name, getattr(module, name)) for module, name in kernels]
    others = launch._multiprocessors, launch.amd, tune.forced
    for module, name, kernel in before:
        setattr(module, name, Recorder(kernel, launches))
    launch._multiprocessors, launch.amd = lambda x: multiprocessors, lambda: amd
    tune.forced = config or tune.candidates(tokens, dtype.itemsize, sum(ranks))[0]
    try:
        mixture = make_mixture(ranks, tuple(16.0 / r for r in ranks))
        R, N = sum(ranks), len(ranks)

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        x, A, B, W, b = empty(tokens, K), empty(R, K), empty(O, R), empty(N, K), empty(N)
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        y, u, g = launch.forward(
            x, A, B, W, b, None, empty(tokens, O), seed, mixture, dropout_p, False, inplace
        )
        launch.backward(y, None, x, u, g, A, B, W, seed, mixture, dropout_p, False, (True,) * 5 + (False,))
    finally:
        for module, name, kernel in before:
            setattr(module, name, kernel)
        launch._multiprocessors, launch.amd, tune.forced = others
    return launches


_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.half: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}


def compile_launch(launch: Launch, target: str) -> dict[str, Any]:
    """Resources and matrix instructions of one kernel, compiled as Triton would on its first launch there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = (
        launch.options
        if TARGETS[target][0] == "cuda"
        else {**launch.options, "num_stages": min(2, launch.options.get("num_stages", 2))}
    )
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    report = {
        "kernel": launch.kernel.__name__,
        "target": target,
        "shared": compiled.metadata.shared,
        "dots": 0,
    }
    report["dots"] = len(re.findall(r"tt\.dot ", compiled.asm["ttir"]))
    report["narrow_dots"] = len(
        re.findall(r"tt\.dot [^\n]*: tensor<\d+x\d+x(?:bf16|f16)", compiled.asm["ttir"])
    )
    if "ptx" in compiled.asm:
        report["matrix"] = len(
            re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"])
        )
        report |= _cubin(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        report["matrix"] = len(re.findall(r"\bv_(mfma|wmma|smfmac)_", code))
        report["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1))
        report["spills"] = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", code))
    return report


def _cubin(cubin: bytes) -> dict[str, int]:
    from sass import cuobjdump

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump(), "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text.stdout + text.stderr).groups()
    return {"registers": int(registers), "spills": int(stack)}


CALLS = {
    "8192": dict(tokens=8192),
    "dropout": dict(tokens=8192, dropout_p=0.05),
    "16": dict(tokens=16),
    "wide": dict(tokens=512, ranks=(16,) * 16),
}


def main(kind: str, targets: list[str]) -> None:
    for target in targets:
        for case, call in CALLS.items():
            seen = set()
            for launch in record(TYPES[kind], amd=target.startswith("gfx"), **call):
                if launch.kernel.__name__ not in seen:
                    seen.add(launch.kernel.__name__)
                    print(json.dumps({**compile_launch(launch, target), "case": case}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(TARGETS))
