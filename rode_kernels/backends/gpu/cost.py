"""Bytes that a call must move on a GPU, by formulas from its shapes, and the least time that this takes on a device.

Two counts, kept apart: DRAM, each tensor's distinct bytes once a launch, and L2, all that threads load or store. Tests hold the
formulas of the CUDA kernels to what the emulator counts, within 3 %; those of Triton follow from its grids and blocks. A floor is a
prediction, not a measurement: what moving so much takes at the device's full bandwidths, longer where launches have too few blocks
for all of its multiprocessors, each of which is taken to have its share and no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, ProblemShape, divide_up

TILE = 64  # tokens
# Seconds that a block takes for a stage in 16 bits, which is little more than a way to memory, and in float32, by three products of
# values that are split first. Measured on one H200.
STAGE = {2: 0.35e-6, 4: 0.9e-6}


@dataclass(frozen=True)
class Device:
    """A device's speeds, from which floors follow. Bandwidths are in bytes a second; `launch`: seconds for one more launch.

    Attributes:
        l2: bandwidth of the L2 cache, a rough figure: makers do not publish it.
        tensor: dense 16-bit products, operations a second (a multiplication and an addition are two).
        shared: bytes of shared memory that a block may ask for.
    """

    name: str
    multiprocessors: int
    dram: float
    l2: float
    tensor: float
    shared: int
    launch: float = 2e-6


# From the makers' data sheets (L2: from published microbenchmarks, to one digit), `shared` from the CUDA programming guide.
DEVICES = {
    d.name: d
    for d in (
        Device("RTX 4090", 128, 1.008e12, 5e12, 165e12, 99 * 1024),
        Device("A100", 108, 2.039e12, 5e12, 312e12, 163 * 1024),
        Device("H100", 132, 3.35e12, 6e12, 989e12, 227 * 1024),
        Device("H200", 132, 4.8e12, 6e12, 989e12, 227 * 1024),
        Device("B200", 148, 8.0e12, 1e13, 2250e12, 227 * 1024),
    )
}


@dataclass(frozen=True)
class Step:
    """One launch: bytes of DRAM and L2, blocks, operations of matrix units, and blocks that a multiprocessor holds at once.

    `busy`: so many of them it takes to keep it busy, for warps wait, for memory and for one another. `stages`: seconds that
    those of its pipeline take a block one after the other.
    """

    dram: float
    l2: float
    blocks: int
    operations: float = 0.0
    resident: int = 2
    busy: int = 1
    stages: float = 0.0

    def floor(self, device: Device) -> float:
        """Seconds, if a block has its multiprocessor's share of everything: few blocks do not have it all, nor does a second wave
        that is not full, nor multiprocessors that have a block more than others. And a block takes its time, however few there
        are."""
        if not self.blocks:
            return 0.0  # no launch
        fraction = min(1.0, self.blocks / (device.multiprocessors * self.busy))
        waves = self.blocks / (device.multiprocessors * self.resident)
        if self.blocks > device.multiprocessors and waves <= 1:
            # some have a block more than others; part of the bandwidth that these leave goes to those
            most = divide_up(self.blocks, device.multiprocessors)
            fraction = min(fraction, (1 + self.blocks / (device.multiprocessors * most)) / 2)
        elif 1 < waves <= 2:
            fraction = min(fraction, waves / 2)
        work = max(self.dram / device.dram, self.l2 / device.l2, self.operations / device.tensor)
        return max(work / fraction, self.stages * max(1.0, waves)) + device.launch


@dataclass(frozen=True)
class Cost:
    """The launches of a pass, one after the other."""

    steps: tuple[Step, ...]

    @property
    def dram(self) -> float:
        return sum(step.dram for step in self.steps)

    @property
    def l2(self) -> float:
        return sum(step.l2 for step in self.steps)

    @property
    def launches(self) -> int:
        return len(self.steps)

    def floor(self, device: Device) -> float:
        """Seconds that it takes at least."""
        return sum(step.floor(device) for step in self.steps)


def fewest(c: ProblemShape, backward: bool = False) -> float:
    """Bytes that no implementation can do without: activations once, the weights read once."""
    M, K, O, R, N = c.tokens, c.in_features, c.out_features, c.total_rank, c.routed_experts
    activations = M * (2 * K + O) if backward else M * (K + O * (2 if c.base else 1))
    return c.element_size * (activations + (R + N) * K + O * R)


# ---- CUDA: csrc/cuda/forward.cuh, backward_params.cuh


def forward(c: ProblemShape, plan: Plan) -> Cost:
    """Cost of the forward kernels under a plan."""
    M, K, O, R, N = c.tokens, c.in_features, c.out_features, c.total_rank, c.routed_experts
    e, part, tiles = c.element_size, c.open_share, divide_up(c.tokens, plan.rows)
    weights, of_y = (R + N) * K * e, M * O * e * (1 + c.base) * (part if c.in_place else 1.0)
    gates, u, read_B = M * c.experts * 4, M * R * 4, O * R * e * (part > 0)
    depth = 128 // e  # columns of a stage
    products = 6 if e == 4 else 1  # of float32 three, of tf32 values, at half the rate
    down, up = products * 2.0 * M * K * (R + N), products * 2.0 * M * O * R * part
    again_B = tiles * part * O * R * e  # by every tile of tokens
    # gates, or for whole tiles the router's bias, are read by each of the warps that have the same tokens
    by_warps = (4 if plan.rows == 16 else 2) * (tiles * plan.rows * N * 4 if c.routed else gates)
    if plan.fused:
        dram = M * K * e + weights + read_B + of_y + gates + u
        l2 = M * K * e + tiles * weights + again_B + of_y + by_warps + gates * c.routed + u
        stages = STAGE[e] * (divide_up(K, depth) + divide_up(O, depth))
        return Cost((Step(dram, l2, tiles, down + up, stages=stages),))
    columns, of_experts = 8 * (divide_up(R, 8) + divide_up(N, 8)), 8 * divide_up(R, 8)
    passes = divide_up(columns // 8, 5 if columns <= 40 else 16)
    partial = plan.splits * M * columns * 4
    first = Step(
        M * K * e + weights + partial,
        M * K * e * passes + tiles * weights + partial,
        passes * tiles * plan.splits,
        down,
        stages=STAGE[e] * divide_up(divide_up(K, depth), plan.splits),
    )
    outs = divide_up(O, depth)
    splits_O = divide_up(outs, plan.out_tiles)
    # v of several passes is kept in shared memory, or both of the warps that have the same tokens make it again for every 128 bytes
    # of y
    chunks = divide_up(of_experts, depth)
    again = chunks > 1 and not plan.keep_v
    read = partial * (splits_O + (2 * outs * of_experts / columns if again else 0))
    second = Step(
        partial + read_B + of_y + gates + u,
        read + again_B + of_y + gates * c.routed + by_warps * splits_O + u,
        tiles * splits_O,
        up,
        stages=STAGE[e] * (plan.out_tiles * chunks + divide_up(plan.splits, 32 if plan.rows == 16 else 8)),
    )
    return Cost((first, second))


def resident_grad_output(many_columns: bool, element_size: int) -> int:
    """Blocks of grad_output_pass that a multiprocessor's registers suffice for (`OTileShape`)."""
    return 1 if many_columns or element_size == 4 else 2


def resident_grad_input(groups: int) -> int:
    """The same for grad_input_pass, by the groups of columns that a block has (`ColumnShape`)."""
    return 3 if groups == 3 else 2


def backward(c: ProblemShape, plan: BackwardPlan) -> Cost:
    """Cost of the backward kernels under a plan, with every gradient wanted."""
    M, K, O, R, N = c.tokens, c.in_features, c.out_features, c.total_rank, c.routed_experts
    e, part, tiles = c.element_size, c.open_share, divide_up(c.total_rank, 8)
    splits_y, splits_x = divide_up(M, plan.tokens_per_split_y), divide_up(M, plan.tokens_per_split_x)
    products = 6 if e == 4 else 1
    chunks = divide_up(R, 64 if plan.many_columns else 32)  # of columns, each of which reads dy
    g, u, dh = M * c.experts * 4, M * R * 4, M * c.experts * 4
    t = plan.o_tiles * divide_up(M, 16) * tiles * 512 * part
    dB_partial = splits_y * O * 8 * tiles * 4
    y = Step(
        M * O * e * part + O * R * e + g + u + t + dB_partial,
        M * O * e * part * chunks
        + splits_y * O * R * e
        + plan.o_tiles * (chunks * g + 2 * u * part)
        + t
        + dB_partial,
        plan.o_tiles * splits_y * chunks,
        products * 4.0 * M * O * R * part,
        resident=resident_grad_output(plan.many_columns, e),
        busy=resident_grad_output(plan.many_columns, e),
    )
    groups = divide_up(R, 16) + divide_up(N, 16)
    D = M * 16 * groups * e
    dbias_partial = divide_up(M, 16) * N * 4
    flags = divide_up(M, 16) * 4  # which tokens have anything open
    moved = t + u * part + g + D + dh + dbias_partial + flags
    v = Step(moved, moved, divide_up(M, 16))
    k_tiles, many_columns = divide_up(K, 256 // e), plan.groups == 4
    kinds = divide_up(groups, 4) if many_columns else 1  # chunks of D, each of which reads x
    weights_partial = splits_x * (R + N) * K * 4
    # weights are read again for every tile, or stand in registers
    again = divide_up(M, TILE) if many_columns else splits_x
    splits_dx = divide_up(M, plan.tokens_per_split_dx)
    x = Step(
        M * K * e * (1 + part) + (R + N) * K * e + D + flags + weights_partial,
        M * K * e * (1 + part * kinds)
        + 2 * again * (R + N) * K * e  # by pairs of lanes
        + k_tiles * (D * part * (2 if many_columns else 1) + flags * (kinds + many_columns))
        + weights_partial,
        k_tiles * (splits_x * kinds + splits_dx * many_columns),
        products * 4.0 * M * K * (R + N) * part,
        resident=resident_grad_input(plan.groups),
        busy=resident_grad_input(plan.groups),
    )
    count = O * R + (R + N) * K
    moved = splits_y * O * R * 4 + weights_partial + dbias_partial + count * e + N * 4
    add = Step(moved, moved, divide_up(divide_up(count, 32) * 32 + 32 * N, 128))
    return Cost((y, v, x, add))


# ---- PyTorch's products and csrc/cuda/gates.cuh


def gemm_path(c: ProblemShape, backward: bool = False) -> Cost:
    """The cost of `rode_kernels.backends.gpu.gemm_path`.

    Its products are taken to read and write once, with blocks enough for any device. They multiply closed experts, too. With
    dropout they read a copy of x; in the backward pass dropout also goes through dx, to which the router's part is then added.
    """
    M, K, O, R, e = c.tokens, c.in_features, c.out_features, c.total_rank, c.element_size
    columns, pitch = divide_up(R + c.routed_experts, 8) * 8, divide_up(R, 8) * 8
    rate = 24 if e == 4 else 1  # float32 by ordinary multiply-adds
    weights, u, g, v, D = columns * K * e, M * R * 4, M * c.experts * 4, M * pitch * e, M * columns * e
    bytes_B = O * pitch * e

    def product(moved: float, columns: int, width: int) -> Step:
        return Step(moved, moved, 1 << 20, 2.0 * M * columns * width * rate)

    def kernel(moved: float, blocks: int) -> Step:
        return Step(moved, moved, blocks)

    def pack(with_B: bool) -> Step:
        moved = (R + c.routed_experts) * K * e + weights + (O * R * e + bytes_B if with_B else 0)
        return kernel(moved, divide_up(columns * K * e, 16 * 128))

    packed = [pack(pitch != R)] if c.routed or columns != R else []
    gate_blocks = divide_up(M, 8)
    drop = [kernel(2 * M * K * e, divide_up(M * divide_up(K, 16), 128))] if c.dropout else []
    if not backward:
        sums, of_y = M * columns * 4, M * O * e * (1 + c.base)
        return Cost(
            (
                *packed,
                *drop,
                product(M * K * e + weights + sums, columns, K),
                kernel(sums + u + g + v, gate_blocks),
                product(v + bytes_B + of_y, pitch, O),
            )
        )
    t, dy, x = M * pitch * 4, M * O * e, M * K * e
    return Cost(
        (
            *packed,
            product(dy + bytes_B + t, pitch, O),
            kernel(t + u + 2 * g + v + D, gate_blocks),
            product(dy + v + O * pitch * 4, pitch, O),
            *drop,
            product(x + D + columns * K * 4, columns, K),
            product(D + weights + x, columns, K),
            *([*drop, kernel(2 * x, 1 << 20)] if c.dropout else []),
        )
    )


def seconds(value: float) -> str:
    """A time for people."""
    if value >= 1:
        return f"{value:.2f} s"
    power = min(3, max(1, math.ceil(-math.log10(value) / 3)))
    return f"{value * 1000**power:.3g} {('ms', 'us', 'ns')[power - 1]}"
