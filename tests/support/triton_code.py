"""What Triton makes of its kernels for GPUs that are not here: the launches of real calls, recorded, and compiled ahead of time.

Run as a program, for the interpreter must be off: `python tests/support/triton_code.py TYPE calls|choices TARGET...` prints one
JSON object a compiled kernel: of calls by rule, or of what else tuning may choose.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rode_kernels.backends.triton.record import Launch, record

TARGETS = {
    **{f"sm_{cc}": ("cuda", cc, 32) for cc in (80, 89, 90, 100, 120)},
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
}
TYPES = {"bf16": torch.bfloat16, "f16": torch.half, "float": torch.float32}


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
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialised):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0 and specialised:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch.options)
    report = {
        "kernel": launch.kernel.__name__,
        "target": target,
        "shared": compiled.metadata.shared,
    }
    report["dots"] = len(re.findall(r"tt\.dot ", compiled.asm["ttir"]))
    report["narrow_dots"] = len(
        re.findall(r"tt\.dot [^\n]*: tensor<\d+x\d+x(?:bf16|f16)", compiled.asm["ttir"])
    )
    # Products that the compiler left to ordinary instructions: their operands are laid out for no matrix unit.
    left = re.findall(r"tt\.dot [^\n]*parent = #blocked[^\n]*", compiled.asm["ttgir"])
    report["left"] = sum(bool(re.search(r"x(?:bf16|f16),", line)) for line in left)
    report["left_fp32"] = len(left) - report["left"]
    if "ptx" in compiled.asm:
        report["matrix"] = len(
            re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"])
        )
        report |= _cubin(compiled.asm["cubin"])
    else:
        code = compiled.asm["amdgcn"]
        report["matrix"] = len(re.findall(r"\bv_(mfma|wmma|smfmac)_", code))
        report["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", code).group(1))
        # scalar registers spill to lanes of a vector register, not to memory
        report["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code).group(1))
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
        spills = 0
        if int(stack):  # a stack that no instruction touches is none
            path = {"PATH": f"{Path(cuobjdump()).parent}:/usr/bin:/bin"}
            sass = subprocess.run(
                [cuobjdump(), "-sass", file.name], env=path, check=True, capture_output=True, text=True
            )
            spills = len(re.findall(r"\b(?:LDL|STL)\b", sass.stdout))
    return {"registers": int(registers), "spills": spills}


# The order of `needs`: x, A, B, the router's weights, its bias, given gates.
ALONE = {name: tuple(i == at for i in range(6)) for at, name in enumerate(("x", "A", "B", "router", "bias"))}
CALLS = {
    "8192": dict(tokens=8192),
    "dropout": dict(tokens=8192, dropout_p=0.05),
    "65536": dict(tokens=65536),
    "16": dict(tokens=16, inplace=True),
    "one expert": dict(tokens=8192, ranks=(8,)),
    "one expert of rank 32": dict(tokens=8192, ranks=(32,)),
    "narrow": dict(tokens=8192, ranks=(4, 4)),
    "gated": dict(tokens=8192, gated=True),
    **{f"{name} alone": dict(tokens=8192, needs=needs) for name, needs in ALONE.items()},
    **{
        f"{name} alone, many columns": dict(tokens=512, ranks=(40, 40), needs=needs)
        for name, needs in ALONE.items()
    },
    "dropout on ragged rows": dict(tokens=8192, K=4098, dropout_p=0.05),
    "dropout on few tokens": dict(tokens=64, dropout_p=0.05),
    "siblings": dict(tokens=8192, siblings=2),
    "siblings with masks": dict(tokens=8192, siblings=2, dropout_p=0.05),
    "three siblings with masks and many columns": dict(
        tokens=512, ranks=(40, 40), siblings=3, dropout_p=0.05
    ),
    "gates alone": dict(tokens=8192, without_dy=True),
    "1": dict(tokens=1),  # what is 1 becomes a constant
    "ones": dict(tokens=1, K=1, O=1),
    "one expert of many columns": dict(tokens=8192, ranks=(64,)),
    "many columns": dict(tokens=512, ranks=(16,) * 16),
    "most columns": dict(tokens=512, ranks=(128,) * 8),
    "gemm path": dict(tokens=8192, ranks=(16,) * 16, gemm_path=True),
    "gemm path, 64 experts": dict(tokens=8192, ranks=(16,) * 64, gemm_path=True),
    "gemm path, gated": dict(tokens=8192, ranks=(40, 40), gemm_path=True, gated=True),
}


CHOICES = {
    f"{case}, configuration {choice}": dict(CALLS[case], choice=choice)
    for case in ("8192", "16", "many columns")
    for choice in range(1, 5)
}


def main(kind: str, calls: dict[str, dict], targets: list[str]) -> None:
    for target in targets:
        seen = set()
        for case, call in calls.items():
            for launch in record(TYPES[kind], amd=target.startswith("gfx"), **call):
                constants = {k: v for k, v in launch.arguments.items() if type(v) is not torch.Tensor}
                same = (launch.kernel.__name__, tuple(launch.options.items()), tuple(constants.items()))
                if same not in seen:
                    seen.add(same)
                    print(json.dumps({**compile_launch(launch, target), "case": case}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], {"calls": CALLS, "choices": CHOICES}[sys.argv[2]], sys.argv[3:])
