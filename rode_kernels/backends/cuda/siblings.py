"""Mixtures that read the same x by the CUDA kernels: the launches over x once for all of them, the others for each.

Forward: pack_parameters of each, forward_shrink of all, forward_expand of each. Backward: pack_parameters, grad_output_pass and
gate_backward of each, grad_input_pass of all, reduce_partials of each. Where columns stand: `rode_kernels.backends.gpu.siblings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor

from rode_kernels.backends.cuda.passes import Passes, row_distance, with_contiguous_parameters
from rode_kernels.backends.cuda.prepared import GateKernel, Kernels, address
from rode_kernels.backends.gpu import gemm_siblings
from rode_kernels.backends.gpu.gemm_path import Dropout, product
from rode_kernels.backends.gpu.layout import Layout, tf32_allowed, with_neighbouring_columns
from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.backends.gpu.siblings import (
    BackwardPlans,
    Columns,
    ForwardPlans,
    apart,
    count_masks,
    say_one_by_one,
    seeds_of,
)
from rode_kernels.backends.native import problem_arguments
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import Needs, Outputs

_COLUMNS_OF_SHRINK = 128  # what one reading of x gives; beyond that PyTorch's product is faster


class _Siblings:
    """The part that both passes share: the problem of all mixtures as one, and parameters side by side in x's type.

    Args:
        multiple: at which a mixture's columns begin.
    """

    def __init__(self, kernels: Kernels, layouts: tuple[Layout, ...], device: int, multiple: int):
        self.kernels, self.layouts, self.device = kernels, layouts, device
        shape, settings = layouts[0].shape, layouts[0].settings
        mixtures = [layout.settings.mixture for layout in layouts]
        self.tokens, self.K, self.itemsize = shape.tokens, shape.in_features, layouts[0].dtype.itemsize
        self.columns = Columns.of(mixtures, multiple)
        self.pitch_K = divide_up(self.K, 8) * 8
        self.fp32 = layouts[0].dtype == torch.float32
        self.pitches_R = [
            divide_up(m.total_rank, 8) * 8 if layout.params_fp32[2] else m.total_rank
            for m, layout in zip(mixtures, layouts, strict=True)
        ]
        widest = max(layout.shape.out_features for layout in layouts)
        joint = self.columns.settings(settings.dropout_p)
        self.joint = problem_arguments(layouts[0].dtype, self.tokens, self.K, widest, joint)
        self.packs = []
        for j, layout in enumerate(layouts):
            rows_A, rows_router = (divide_up(n, multiple) * multiple for n in self._counts(j))
            pack = kernels.native.Pack(
                **kernels.problem(layout),
                params_fp32=layout.params_fp32,
                rows=rows_A + rows_router,
                pitch_K=self.pitch_K,
                pitch_R=divide_up(layout.shape.total_rank, 8) * 8,
                device=device,
                rows_A=rows_A,
                first_row=self.columns.experts[j],
                first_router=self.columns.routers[j],
                all_rows=self.columns.total,
            )
            self.packs.append(pack)

    def _counts(self, j: int) -> tuple[int, int]:
        shape = self.layouts[j].shape
        return shape.total_rank, shape.experts

    def parameters(
        self, operands: Sequence[AnyOperands], stream: int, with_W: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """W (columns, pitch_K), which is all A above all routers, with zeros between, and each B."""
        W = self.kernels.empty(self.columns.total, self.pitch_K, like=operands[0].x) if with_W else None
        Bs = []
        for o, layout, pack, pitch_R in zip(operands, self.layouts, self.packs, self.pitches_R, strict=True):
            packed = None
            if layout.params_fp32[2]:
                packed = self.kernels.empty(layout.shape.out_features, pitch_R, like=o.x)
            if W is not None or packed is not None:
                pack(
                    address(o.A), address(o.router_weight), address(o.B), address(W), address(packed), stream
                )
            Bs.append(o.B if packed is None else packed)
        return W, Bs

    def router_of(self, W: Tensor) -> int:
        """The address of the first router's row."""
        return W.data_ptr() + self.columns.total_rank * self.pitch_K * self.itemsize


class SiblingsForward(_Siblings):
    """The forward pass of all mixtures.

    Args:
        plans: as the planner gives them. by_product: x W^T is PyTorch's. masks: see `count_masks`.
        ld_x, lds: elements from row to row of x; of each base (0: none) and y.
    """

    def __init__(
        self,
        kernels: Kernels,
        layouts: tuple[Layout, ...],
        plans: ForwardPlans,
        by_product: bool,
        masks: int,
        device: int,
        ld_x: int,
        lds: tuple[tuple[int, int], ...],
    ):
        super().__init__(kernels, layouts, device, 8)
        columns, self.by_product = self.columns, by_product
        self.splits = 1 if by_product else plans.each[0].splits
        first = dict(asdict(plans.each[0]), keep_v=False)
        self.shrink = kernels.native.ForwardLaunch(
            **self.joint,
            **dict(ld_x=ld_x, ld_base=0, ld_y=0, ld_A=self.pitch_K, ld_B=0, device=device),
            **first,
            **dict(columns=columns.total, first_column=0, router_gap=0, masks=masks),
        ).shrink
        self.expands = []
        for j, (layout, plan) in enumerate(zip(layouts, plans.each, strict=True)):
            plan.check(layout.shape.total_rank, layout.shape.experts, self.itemsize)
            after = columns.experts[j] + divide_up(layout.shape.total_rank, 8) * 8
            launch = kernels.native.ForwardLaunch(
                **kernels.problem(layout),
                **dict(ld_x=ld_x, ld_base=lds[j][0], ld_y=lds[j][1], ld_A=self.pitch_K, device=device),
                **dict(asdict(plan), splits=self.splits, ld_B=self.pitches_R[j]),
                columns=columns.total,
                first_column=columns.experts[j],
                router_gap=(columns.routers[j] - after) // 8,
                masks=1,
            )
            self.expands.append(launch.expand)

    def __call__(
        self, operands: Sequence[ForwardOperands], ys: Sequence[Tensor], seeds: Tensor | None, stream: int
    ) -> list[Outputs]:
        """Writes each y; gives it with u and g."""
        empty, floats, x = self.kernels.empty, torch.float32, operands[0].x
        fast = self.fp32 and tf32_allowed()
        W, Bs = self.parameters(operands, stream)
        assert W is not None
        if self.by_product:
            partial = product(x, W[:, : self.K].t())
        else:
            partial = empty(self.splits, self.tokens, self.columns.total, like=x, dtype=floats)
            weights = (W.data_ptr(), self.router_of(W))
            sums = (address(partial), address(seeds))
            self.shrink(x.data_ptr(), 0, 0, *weights, *(0,) * 5, *sums, fast, stream)
        outputs = []
        for o, y, B, layout, expand in zip(operands, ys, Bs, self.layouts, self.expands, strict=True):
            u = empty(self.tokens, layout.shape.total_rank, like=x, dtype=floats)
            g = empty(self.tokens, layout.shape.experts, like=x, dtype=floats)
            of_y = (address(o.base), y.data_ptr(), W.data_ptr(), self.router_of(W), B.data_ptr())
            results = (address(o.router_bias), 0, u.data_ptr(), g.data_ptr())
            expand(0, *of_y, *results, address(partial), 0, fast, stream)
            outputs.append((y, u, g))
        return outputs


class SiblingsBackward(_Siblings):
    """The backward pass of all mixtures, called like `PreparedBackward`.

    Args:
        plans: as the planner gives them. by_products: D^T x and D W are PyTorch's. masks: as above.
        ld_x, ld_dys: elements from row to row of x; of each dy also from column to column, None where there is none.
        needs: the wanted gradients of each.
    """

    def __init__(
        self,
        kernels: Kernels,
        layouts: tuple[Layout, ...],
        plans: BackwardPlans,
        by_products: bool,
        masks: int,
        device: int,
        ld_x: int,
        ld_dys: tuple[tuple[int, int] | None, ...],
        needs: tuple[Needs, ...],
    ):
        super().__init__(kernels, layouts, device, 16)
        plans.shared.check(self.itemsize)
        self.needs, self.by_products = needs, by_products
        self.need_x = needs[0][0]
        self.need_A, self.need_router = (any(n[i] for n in needs) for i in (1, 3))
        self.sums_x = self.need_A or self.need_router
        self.need_v = self.need_x or self.sums_x or any(n[4] for n in needs)
        M, columns, tiles16 = self.tokens, self.columns, divide_up(self.tokens, 16)
        ranges_x = divide_up(M, plans.shared.tokens_per_split_x)
        # As in `PreparedBackward`: intermediate results stand in one piece of memory.
        parts: dict[str, tuple[bool, int]] = {
            "D": (self.need_v, M * columns.total * self.itemsize),
            "open": (self.need_v, len(layouts) * tiles16 * 4),
            "weights_partial": (
                self.sums_x and not by_products,
                ranges_x * columns.total * self.pitch_K * 4,
            ),
        }
        for j, (layout, plan, need) in enumerate(zip(layouts, plans.each, needs, strict=True)):
            shape, tiles = layout.shape, divide_up(layout.shape.total_rank, 8)
            splits_y = divide_up(M, plan.tokens_per_split_y)
            has_dy = ld_dys[j] is not None
            parts[f"t{j}"] = self.need_v and has_dy, plan.o_tiles * tiles16 * tiles * 128 * 4
            parts[f"dB{j}"] = need[2] and has_dy, splits_y * shape.out_features * 8 * tiles * 4
            parts[f"dbias{j}"] = need[4], tiles16 * shape.experts * 4
        self.scratch_bytes = 0
        self.offsets: dict[str, int] = {}
        for name, (needed, size) in parts.items():
            if needed:
                self.offsets[name] = self.scratch_bytes
                self.scratch_bytes += divide_up(size, 256) * 256
        common = dict(ld_x=ld_x, ld_A=self.pitch_K, device=device, open_parts=len(layouts))
        self.grad_input = kernels.native.BackwardLaunch(
            **self.joint,
            **common,
            **asdict(plans.shared),
            **dict(ld_dy=(0, 0), ld_B=0, params_fp32=(False,) * 3, open_part=0),
            **dict(D_pitch=columns.total, D_first=0, D_router=columns.total_rank, masks=masks),
        ).grad_input
        self.each = []
        for j, (layout, plan) in enumerate(zip(layouts, plans.each, strict=True)):
            plan.check(self.itemsize)
            launch = kernels.native.BackwardLaunch(
                **kernels.problem(layout),
                **common,
                **asdict(plan),
                **dict(ld_dy=ld_dys[j] or (0, 0), ld_B=self.pitches_R[j], params_fp32=layout.params_fp32),
                **dict(D_pitch=columns.total, D_first=columns.experts[j], D_router=columns.routers[j]),
                **dict(open_part=j, masks=1),
            )
            self.each.append(launch)

    def __call__(
        self, operands: Sequence[BackwardOperands], seeds: Tensor | None, stream: int
    ) -> list[Gradients]:
        """The gradients, each in its parameter's dtype; x's stands in the first ones."""
        empty, x, M = self.kernels.empty, operands[0].x, self.tokens
        fast = self.fp32 and tf32_allowed()
        W, Bs = self.parameters(operands, stream, self.need_x)
        scratch = empty(self.scratch_bytes, like=x, dtype=torch.uint8)

        def at(name: str) -> int:
            return scratch.data_ptr() + self.offsets[name] if name in self.offsets else 0

        calls, found = [], []
        for j, (o, B, need) in enumerate(zip(operands, Bs, self.needs, strict=True)):
            assert o.router_weight is not None
            dA = empty(*o.A.shape, like=o.A) if need[1] else None
            dB = empty(*o.B.shape, like=o.B) if need[2] else None
            dW = empty(*o.router_weight.shape, like=o.router_weight) if need[3] else None
            dbias = empty(o.g.shape[1], like=o.g) if need[4] else None
            dh = empty(M, o.g.shape[1], like=o.g) if self.need_v else None
            if dB is not None and o.dy is None:
                dB.zero_()
            # the router's address only says that there is one
            before = (address(o.dy), 0, 0, address(o.router_weight), address(B), address(o.u), address(o.g))
            inside = (address(dh), at("D"), at("open"), at(f"t{j}"), at(f"dB{j}"))
            after = (at("weights_partial"), at(f"dbias{j}"), fast, stream)
            self.each[j].grad_output(*before, address(o.dgates), *(0,) * 6, *inside, *after)
            sums_x = (0, 0) if self.by_products else (address(dA), address(dW))
            of_y = (address(dB) if o.dy is not None else 0, address(dbias))
            calls.append((*(0,) * 3, address(o.router_weight), *(0,) * 6, *sums_x, *of_y, *inside, *after))
            found.append(Gradients(None, dA, dB, dW, dbias, None))
        dx = None
        if self.by_products and (self.need_x or self.sums_x):
            dx = self._products(x, W, scratch, found)
        elif self.need_x or self.sums_x:
            dx = empty(*x.shape, like=x) if self.need_x else None
            weights = (0, at("open")) if W is None else (W.data_ptr(), self.router_of(W))
            # of dA and dWr it only asks whether they are wanted
            results = (address(dx), self.need_A * at("D"), self.need_router * at("D"), 0, 0, 0)
            inputs = (0, x.data_ptr(), *weights, 0, 0, 0, 0, address(seeds))
            sums = (at("D"), at("open"), 0, 0, at("weights_partial"), 0)
            self.grad_input(*inputs, *results, *sums, fast, stream)
        for launch, call in zip(self.each, calls, strict=True):
            launch.reduce(*call)
        return [grads._replace(x=None if j else dx) for j, grads in enumerate(found)]

    def _products(
        self, x: Tensor, W: Tensor | None, scratch: Tensor, found: Sequence[Gradients]
    ) -> Tensor | None:
        """The same by PyTorch's products: gives dx, and writes the gradients of A and the routers."""
        first, columns = self.offsets["D"], self.columns
        size = self.tokens * columns.total * self.itemsize
        D = scratch[first : first + size].view(x.dtype).view(self.tokens, columns.total)
        if self.sums_x:
            sums = product(D.t(), x)
            for grads, of_A, of_router in zip(found, columns.experts, columns.routers, strict=True):
                if grads.A is not None:
                    grads.A.copy_(sums[of_A : of_A + grads.A.shape[0]])
                if grads.router_weight is not None:
                    grads.router_weight.copy_(sums[of_router : of_router + grads.router_weight.shape[0]])
        if W is None:
            return None
        W = W[:, : self.K]
        return torch.mm(D, W) if x.is_cuda else product(D, W).to(x.dtype)


class SiblingPasses:
    """Both passes of siblings on one kind of device, made once for every layout."""

    def __init__(self, passes: Passes):
        self.passes = passes
        self.forward_of = lru_cache(maxsize=4096)(SiblingsForward)
        self.backward_of = lru_cache(maxsize=4096)(SiblingsBackward)

    def _layouts(
        self, operands: Sequence[AnyOperands], settings: Sequence[Settings], backward: bool
    ) -> tuple[tuple[Layout, ...], bool] | None:
        """The layout of each, and whether they take the GEMM path, as one of them alone would; None where they run one by one."""
        if operands[0].x.shape[0] == 0:
            return None
        layouts = tuple(Layout.of(o, s) for o, s in zip(operands, settings, strict=True))
        by_gemm = any(self.passes.prefer_gemm(layout, backward) for layout in layouts)
        why = apart(operands, settings, by_gemm)
        if why:
            say_one_by_one(why)
            return None
        return layouts, by_gemm

    def _gemm_kernels(
        self, layouts: tuple[Layout, ...], operands: Sequence[AnyOperands], masks: int, device: int
    ) -> tuple[list[GateKernel], gemm_siblings.SiblingDropout | None]:
        self.passes.limits(device)  # prepares it
        kernels, seeds = self.passes.kernels, seeds_of(operands, masks)
        gates = [self.passes.gate_kernel(kernels, layout, device) for layout in layouts]
        if seeds is None or not layouts[0].shape.dropout:
            return gates, None
        each, alone = (self.passes.drop_kernel(kernels, layouts[0], device, n) for n in (masks, 1))
        return gates, gemm_siblings.SiblingDropout(Dropout(each, gates[0], masks), alone, seeds)

    def forward(
        self, operands: Sequence[ForwardOperands], settings: Sequence[Settings], device: int, stream: int
    ) -> list[Outputs] | None:
        """The forward passes, in place where there is a base; None where calls one by one are better or the only way."""
        found = self._layouts(operands, settings, False)
        if found is None:
            return None
        layouts, by_gemm = found
        columns, masks = Columns.of([s.mixture for s in settings], 8), count_masks(operands, settings)
        plans = None if by_gemm else self.passes.plan_siblings_forward(layouts, columns, masks, device)
        if plans is None and not by_gemm:
            return None
        x = with_neighbouring_columns(operands[0].x)
        ready, ys = [], []
        for o in operands:
            o = with_contiguous_parameters(o)._replace(x=x, base=with_neighbouring_columns(o.base))
            ready.append(o)
            y = o.base
            ys.append(self.passes.kernels.empty(x.shape[0], o.B.shape[0], like=x) if y is None else y)
        if plans is None:
            way = self._gemm_kernels(layouts, operands, masks, device)
            return gemm_siblings.forward(*way, layouts, ready, ys, stream)
        by_product = columns.total > _COLUMNS_OF_SHRINK and self.passes.may_multiply(layouts[0])
        lds = tuple((row_distance(o.base), row_distance(y)) for o, y in zip(ready, ys, strict=True))
        kernels = self.passes.kernels
        run = self.forward_of(kernels, layouts, plans, by_product, masks, device, row_distance(x), lds)
        return run(ready, ys, seeds_of(operands, masks), stream)

    def backward(
        self,
        operands: Sequence[BackwardOperands],
        settings: Sequence[Settings],
        needs: Sequence[Needs],
        device: int,
        stream: int,
    ) -> list[Gradients] | None:
        """The backward passes, the first one with the sum of the gradients of x; None as above."""
        found = self._layouts(operands, settings, True)
        if found is None:
            return None
        layouts, by_gemm = found
        columns, masks = Columns.of([s.mixture for s in settings], 16), count_masks(operands, settings)
        plans = None if by_gemm else self.passes.plan_siblings_backward(layouts, columns, masks, device)
        if plans is None and not by_gemm:
            return None
        joint = layouts[0]._replace(shape=columns.shape([layout.shape for layout in layouts]))
        by_products = self.passes.prefer_gemm(joint, True) and self.passes.may_multiply(joint)
        x = with_neighbouring_columns(operands[0].x)
        ready = []
        for o in operands:
            dy = o.dy
            if dy is not None and dy.stride() == (0, 0):  # as in `Passes.backward`
                dy = dy[:1].contiguous().expand(dy.shape)
            ready.append(with_contiguous_parameters(o)._replace(dy=dy, x=x))
        if plans is None:
            way = self._gemm_kernels(layouts, operands, masks, device)
            return gemm_siblings.backward(*way, layouts, ready, needs, stream)
        ld_dys = tuple(None if o.dy is None else (o.dy.stride(0), o.dy.stride(1)) for o in ready)
        kernels, wanted = self.passes.kernels, tuple(tuple(n) for n in needs)
        run = self.backward_of(
            kernels, layouts, plans, by_products, masks, device, row_distance(x), ld_dys, wanted
        )
        return run(ready, seeds_of(operands, masks), stream)
