"""The shapes of a call and the plans that its kernels can run by: what the planner chooses among and the cost model prices."""

from __future__ import annotations

from dataclasses import dataclass

# Limits of the CUDA kernels; the arrays in `ForwardParams` (csrc/cuda/forward.cuh) have these sizes.
MAX_EXPERTS, MAX_RANK, MAX_FEATURES, MAX_TOKENS = 64, 1024, 32768, 2**20
ROW_BYTES = 128  # of a tile in shared memory, whatever the dtype


def divide_up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class ProblemShape:
    """Shapes of a call, as in `csrc/problem.h`.

    Attributes:
        tokens, in_features, out_features: M, K, O. experts: N. total_rank: R.
        element_size: bytes of x's type. routed: gates come from a router.
        base: y is added to something; in_place: there. open_share: of tiles of tokens, those with anything open.
        dropout: there is dropout. masks: of dropout, more than one for mixtures side by side that have masks of their own.
    """

    tokens: int
    in_features: int
    out_features: int
    total_rank: int
    experts: int
    element_size: int = 2
    routed: bool = True
    base: bool = True
    in_place: bool = False
    open_share: float = 1.0
    dropout: bool = False
    masks: int = 1

    @property
    def routed_experts(self) -> int:
        return self.experts if self.routed else 0


@dataclass(frozen=True)
class Plan:
    """How the CUDA forward pass runs (`csrc/cuda/forward.h` has the same fields).

    Attributes:
        fused: one launch: a block takes 64 tokens through both products, v never leaves it. Otherwise two launches, with sums over
            parts of K in memory between them.
        rows: tokens of a tile, 64; or 16, for decoding, where the warps of a block share K instead of tokens.
        splits: parts of K that blocks of the first launch share; the second launch adds them in order.
        out_tiles: how many times 128 bytes of a row of y a block of the second launch produces.
        keep_v: v stays in shared memory between them. Otherwise it is made again for each, if a row of B has more than 128 bytes.
    """

    fused: bool
    rows: int
    splits: int
    out_tiles: int
    keep_v: bool = False

    def check(self, total_rank: int, routed_experts: int, element_size: int) -> None:
        """Raises ValueError for a plan that the kernels have no variant for."""
        if self.fused and not can_fuse(total_rank, routed_experts):
            raise ValueError(
                f"{self}: {total_rank} columns and {routed_experts} routed experts do not fit one launch"
            )
        if self.fused and self.rows != 64:
            raise ValueError(f"{self}: one launch takes tiles of 64 tokens")
        if self.rows not in (16, 64) or (self.rows == 16 and total_rank * element_size > ROW_BYTES):
            raise ValueError(
                f"{self}: tiles have 64 tokens, or 16 if a row of B has at most {ROW_BYTES} bytes"
            )
        if self.splits < 1 or self.out_tiles < 1:
            raise ValueError(f"{self}: expected splits and out_tiles of at least 1")
        if self.keep_v and (self.fused or total_rank * element_size <= ROW_BYTES):
            raise ValueError(
                f"{self}: v is kept with two launches, if a row of B has more than {ROW_BYTES} bytes"
            )


def column_tiles(total_rank: int, routed_experts: int) -> int:
    """Tiles of 8 columns that one pass over x computes: the experts', then the router's (0 where gates are given)."""
    return divide_up(total_rank, 8) + divide_up(routed_experts, 8)


def can_fuse(total_rank: int, routed_experts: int) -> bool:
    """Whether u of 64 tokens has room in the registers of one block."""
    return (total_rank <= 32 and routed_experts <= 8) or (total_rank <= 64 and routed_experts <= 16)


@dataclass(frozen=True)
class BackwardPlan:
    """How the CUDA backward pass runs (`csrc/cuda/backward.h` has the same fields).

    Attributes:
        many_columns: 64 packed columns share a reading of dy, not 32.
        o_tiles, o_tile_columns: parts of O, and their columns; a part of t is the sum over one.
        tokens_per_split_y: tokens of a range whose dB a block of the first launch sums up.
        groups: of 16 columns of du and dh that a block of the third launch has: 3 or 5, all of them; or 4 in turn.
        tokens_per_split_x: tokens of a range whose dA and dWr it sums up.
        tokens_per_split_dx: with 4 groups blocks of their own write dx, each of so many tokens.
    """

    many_columns: bool
    o_tiles: int
    o_tile_columns: int
    tokens_per_split_y: int
    groups: int
    tokens_per_split_x: int
    tokens_per_split_dx: int

    def check(self, element_size: int) -> None:
        """Raises ValueError for a plan that the kernels have no variant for."""
        most = MOST_O_TILE_COLUMNS[self.many_columns, element_size]
        if not 0 < self.o_tile_columns <= most:
            raise ValueError(f"{self}: a block holds at most {most} columns of y")


# Limits of the blocks of grad_output_pass (`OTileShape`) and grad_input_pass (`ColumnShape`): columns of O by (64 packed columns,
# element size), and tokens of a range, of which a block notes in shared memory which ones are open.
MOST_O_TILE_COLUMNS = {(False, 2): 384, (False, 4): 384, (True, 2): 384, (True, 4): 128}
MOST_TOKENS = 16 * 1536
