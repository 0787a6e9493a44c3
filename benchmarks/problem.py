"""Tensors of one call with as many gates open as asked, the forms that compute it, and the check that comes before any timing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import PAPER
from benchmarks.eager import packed, peft_loop
from benchmarks.timing import cache_bytes
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.reference import dropout_keep
from rode_kernels.checks import normalize_seed

MARGIN = 0.1
"""No logit is nearer to 0, so that no form's rounding decides whether a gate is open."""
SEED = 0
"""The seed of torch's generator before each call that is checked, so that the operation's dropout is known."""


def draw_open(tokens: int, experts: int, fraction: float, run: int, generator: torch.Generator) -> Tensor:
    """(M, N) bool: of the (run of tokens, expert) pairs as many as `fraction` says, to the nearest one, drawn at random."""
    runs = -(-tokens // run)
    pairs = torch.zeros(runs * experts, dtype=torch.bool)
    pairs[torch.randperm(len(pairs), generator=generator)[: round(fraction * len(pairs))]] = True
    return pairs.view(runs, experts).repeat_interleave(run, 0)[:tokens]


@dataclass
class Problem:
    """Tensors of one case on one device; parameters have x's dtype or are float32."""

    x: Tensor  # (M, K)
    A: Tensor  # (R, K)
    B: Tensor  # (O, R)
    router: Tensor  # (N, K)
    base: Tensor  # (M, O)
    dy: Tensor  # (M, O)
    ranks: tuple[int, ...]
    dropout: float = 0.0

    @classmethod
    def random(
        cls,
        tokens: int,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        device: str,
        ranks: tuple[int, ...] = PAPER,
        open: float = 0.5,
        run: int = 1,
        dropout: float = 0.0,
        params_fp32: bool = False,
    ) -> Problem:
        """Normal values. x gets what it needs along the router's rows for its gates to be open, or closed, as drawn: every form has
        to compute the router to know it."""
        M, K, O, R, N = tokens, in_features, out_features, sum(ranks), len(ranks)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device) * std

        of_parameters = torch.float32 if params_fp32 else dtype
        x, router = normal(M, K), normal(N, K, std=K**-0.5).to(of_parameters)
        is_open = draw_open(M, N, open, run, torch.Generator().manual_seed(0)).to(device)
        logits = (normal(M, N).abs() + MARGIN) * torch.where(is_open, 1.0, -1.0)
        rows = router.to(dtype).float()
        missing = torch.linalg.solve(rows @ rows.t(), (logits - x @ rows.t()).t())  # (N, M)
        p = cls(
            (x + missing.t() @ rows).to(dtype),
            normal(R, K, std=K**-0.5).to(of_parameters),
            normal(O, R).to(of_parameters),
            router,
            normal(M, O).to(dtype),
            normal(M, O).to(dtype),
            ranks,
            dropout,
        )
        if not torch.equal(p.is_open, is_open):
            raise ValueError(f"in_features: {K} is too few to open the gates of {N} experts as asked")
        return p

    @property
    def scaling(self) -> tuple[float, ...]:
        return tuple(16.0 / r for r in self.ranks)

    @property
    def is_open(self) -> Tensor:
        """(M, N) bool, from what the tensors hold after rounding."""
        router = self.router.to(self.x.dtype).float()
        return torch.cat([part.float() @ router.t() > 0 for part in self.x.split(4096)])

    @property
    def open_share(self) -> float:
        return self.is_open.double().mean().item()

    def keep(self, chunk: int = 4096) -> Tensor | None:
        """(M, K) bool, the elements of x that dropout leaves to the operation after `torch.manual_seed(SEED)`; None without
        dropout."""
        if not self.dropout:
            return None
        torch.manual_seed(SEED)
        seed = normalize_seed(None, self.dropout, self.x)
        M, K = self.x.shape
        parts = [
            dropout_keep(seed, self.dropout, min(chunk, M - first), K, first) for first in range(0, M, chunk)
        ]
        return torch.cat(parts)

    def clone(self) -> Problem:
        tensors = {name: t.clone() for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)

    def copies(self) -> list[Problem]:
        """So many, this one among them, that calls which take one after the other find nothing of an earlier call in cache."""
        call = (self.x, self.A, self.B, self.router, self.base)
        count = enough(sum(t.nbytes for t in call), self.x.device.type)
        return [self, *(self.clone() for _ in range(count - 1))]


def enough(bytes_of_one: int, device: str) -> int:
    """How many copies of so many bytes are twice what the last cache holds; two at least."""
    return max(2, -(-2 * cache_bytes(device) // bytes_of_one))


@dataclass(frozen=True)
class Form:
    """One way to compute the operation.

    Attributes:
        leaves: the tensors that it takes from a problem, x first and base last, made before anything is timed.
        run: y from them. run_in_place: y added into base, where this form can. With dropout both take a keyword `keep`, the mask,
            instead of drawing one; the operation, which has a generator of its own, ignores it.
        unpack: gradients of its leaves as those of (x, A, B, router).
    """

    leaves: Callable[[Problem], list[Tensor]]
    run: Callable[..., Tensor]
    run_in_place: Callable[..., Tensor] | None = None
    unpack: Callable[[list[Tensor]], list[Tensor]] = lambda gradients: gradients[:4]

    def compiled(self) -> Form:
        """A form compiled by torch.compile for these shapes; anything that would run uncompiled is an error."""

        def compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.compile(run, dynamic=False, fullgraph=True)

        in_place = self.run_in_place
        return replace(
            self, run=compiled(self.run), run_in_place=None if in_place is None else compiled(in_place)
        )


def forms(p: Problem, names: Iterable[str]) -> dict[str, Form]:
    """The operation on each of the named backends, "packed" and "loop" (benchmarks/eager.py)."""
    ranks, scaling, dropout, device = p.ranks, p.scaling, p.dropout, p.x.device
    R = sum(ranks)
    expert = torch.arange(len(ranks), device=device).repeat_interleave(torch.tensor(ranks, device=device))
    factors = torch.tensor(scaling, dtype=p.x.dtype, device=device)[expert]

    def separate(q: Problem) -> list[Tensor]:
        return [q.x, q.A, q.B, q.router, q.base]

    def side_by_side(q: Problem) -> list[Tensor]:  # one parameter: nothing has to be put together in a call
        return [q.x, torch.cat([q.A, q.router]), q.B, q.base]

    def on(backend: str, inplace: bool) -> Callable[..., Tensor]:
        options = dict(ranks=ranks, scaling=scaling, dropout_p=dropout, inplace=inplace, backend=backend)
        return lambda x, A, B, W, base, keep=None: rectified_mixture(x, A, B, W, base=base, **options)

    def side(inplace: bool) -> Callable[..., Tensor]:
        return lambda x, down, B, base, keep=None: packed(
            x, down, B, factors, expert, base, inplace, dropout, keep
        )

    found = {name: Form(separate, on(name, False), on(name, True)) for name in names}
    found["packed"] = Form(
        side_by_side,
        side(inplace=False),
        side(inplace=True),
        lambda gradients: [gradients[0], gradients[1][:R], gradients[2], gradients[1][R:]],
    )
    found["loop"] = Form(
        separate,
        lambda x, A, B, W, base, keep=None: peft_loop(x, A, B, W, base, ranks, scaling, dropout, keep),
    )
    return found


def call(run: Callable[..., Tensor], leaves: Sequence[Tensor], keep: Tensor | None) -> Tensor:
    """y, with a known mask where one is given: the operation draws the same one from torch's generator."""
    if keep is None:
        return run(*leaves)
    torch.manual_seed(SEED)
    return run(*leaves, keep=keep)


def gradients(p: Problem, form: Form, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of x, A, B and the router's weights."""
    leaves = trained(form.leaves(p))
    y = call(form.run, leaves, keep)
    return y.detach(), form.unpack(list(torch.autograd.grad(y, leaves, p.dy)))


def gradients_in_place(
    form: Form, leaves: Sequence[Tensor], dy: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of all leaves but base: y is added into it, and it stands for a frozen layer's output."""
    *leaves, base = leaves
    return torch.autograd.grad(call(form.run_in_place, (*leaves, base.detach()), keep), leaves, dy)


def trained(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The same memory, with gradients."""
    return [t.detach().requires_grad_() for t in leaves]


def results(
    p: Problem, form: Form, train: bool, keep: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """y in every way that this form is called, and the gradients of x, A, B and the router's weights where `train`, in every way
    too. `keep`: the mask, where there is dropout."""
    grads: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        ys = {"y": call(form.run, form.leaves(p), keep)}
        if form.run_in_place is not None:
            *leaves, base = form.leaves(p)
            target = base.clone()
            call(form.run_in_place, (*leaves, target), keep)
            ys["y in place"] = target
    if train:
        ys["y with gradients"], found = gradients(p, form, keep)
        ways = [found]
        if form.run_in_place is not None:
            *leaves, base = form.leaves(p)
            leaves = [*trained(leaves), base.clone()]
            ways.append(form.unpack(list(gradients_in_place(form, leaves, p.dy, keep))))
        grads = dict(zip(("x", "A", "B", "the router"), map(list, zip(*ways, strict=True)), strict=True))
    return ys, grads


def check(p: Problem, all_forms: dict[str, Form], train: bool = True, chunk: int = 4096) -> None:
    """All that is timed, `results` of all tokens, against float64 (`chunk` tokens at a time).

    Raises:
        RuntimeError: where one differs by more than rounding in this dtype explains, or is not finite.
    """
    bound = (16 if p.x.element_size() == 2 else 64) * torch.finfo(p.x.dtype).eps
    keep = p.keep(chunk)
    found = {name: results(p, form, train, keep) for name, form in all_forms.items()}

    def compare(name: str, what: str, got: Tensor, truth: Tensor) -> None:
        error = ((got.double() - truth).abs().max() / truth.abs().max()).item()
        if not error < bound:
            raise RuntimeError(f"{name} is wrong ({what}, relative error {error:.2e}): nothing is timed")

    oracle = Form(
        lambda q: [q.x, q.A, q.B, q.router, q.base],
        lambda *leaves, keep=None: peft_loop(*leaves, p.ranks, p.scaling, p.dropout, keep),
    )
    weights = {name: getattr(p, name).to(p.x.dtype).double() for name in ("A", "B", "router")}
    sums: dict[str, Tensor] = {}
    for first in range(0, p.x.shape[0], chunk):
        rows = slice(first, first + chunk)
        part = {name: getattr(p, name)[rows].double() for name in ("x", "base", "dy")}
        truth, true_grads = results(
            replace(p, **part, **weights), oracle, train, None if keep is None else keep[rows]
        )
        for name, (ys, grads) in found.items():
            for what, y in ys.items():
                compare(name, what, y[rows], truth["y"])
            if train:
                for dx in grads["x"]:
                    compare(name, "the gradient of x", dx[rows], true_grads["x"][0])
        for what in true_grads.keys() - {"x"}:
            sums[what] = sums.get(what, 0.0) + true_grads[what][0]
    for what, truth in sums.items():
        for name, (_, grads) in found.items():
            for grad in grads[what]:
                compare(name, f"the gradient of {what}", grad, truth)


def device_of(backend: str) -> str | None:
    """The device on which a backend runs here; None where it cannot."""
    device = "cpu" if backend == "cpu" else "cuda"
    available = backends()[backend].available and (device == "cpu" or torch.cuda.is_available())
    return device if available else None


def best_backend() -> str:
    """Where no backend is named: of a GPU where there is one, else the CPU's."""
    return next((name for name in ("cuda", "triton") if device_of(name)), "cpu")
