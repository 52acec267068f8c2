"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of the blocks and AdamW for all else.

Where FSDP2 shards a model, each rank makes whole matrices of its share orthogonal: rows travel there and back by all-to-all,
and where there are replicas, results by all-gather. No rank computes what another does.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan's: singular values end in about 0.68 .. 1.20
# Polar Express (arXiv:2505.16932), five steps for singular values from 0.001 up, which end in about 0.85 .. 1.14. It wants the
# largest below 1 / 1.02, for bf16's sake; here the first step takes care of that.
POLAR_EXPRESS = (
    (8.156554524902461 / 1.02, -22.48329292557795 / 1.02**3, 15.878769915207462 / 1.02**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
RMS = 0.2  # of an update, in learning rates: about what AdamW's has (arXiv:2502.16982)
ROUND = (
    1 << 26
)  # numbers that a rank takes at once: enough to fill a GPU, little beside what backward needed


def orthogonalize(
    x: Tensor, coefficients: tuple[tuple[float, float, float], ...] = POLAR_EXPRESS
) -> Tensor:
    """About U V^T of each matrix U S V^T in x [n, rows, columns], by Newton-Schulz steps in x's dtype; zeros stay zeros."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def newton_schulz_flops(shape: tuple[int, ...], steps: int = len(POLAR_EXPRESS)) -> int:
    """Floating-point operations of orthogonalize() for one matrix."""
    m, n = sorted(shape)
    return steps * (4 * m * m * n + 2 * m**3)


class Muon(torch.optim.Optimizer):
    """Groups with "muon": True hold matrices and take Muon's update, all others that of torch's fused AdamW.

    The update of a matrix is scaled to the RMS of AdamW's, so one `lr` and `weight_decay` (decoupled) serve both. Parameters
    are plain tensors, or DTensors as FSDP2 leaves them; then step() is collective. coefficients: of the Newton-Schulz steps,
    which compute in dtype (default: bfloat16 on a GPU, float32 on a CPU). Raises ValueError for what is not a matrix.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        coefficients: tuple[tuple[float, float, float], ...] = POLAR_EXPRESS,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "muon": False})
        for group in self.param_groups:
            if group["muon"]:
                group["momentum"] = momentum
                odd = [
                    tuple(parameter.shape) for parameter in group["params"] if parameter.ndim != 2
                ]
                if odd:
                    raise ValueError(
                        f"Muon takes matrices, not parameters of shape {odd[0]}; leave those to AdamW"
                    )
        self.coefficients, self.dtype = coefficients, dtype
        self._adamw = torch.optim.AdamW(
            self._groups(muon=False), lr=lr, betas=betas, eps=eps, fused=True
        )

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. Collective where they are sharded."""
        assert closure is None
        self._adamw.param_groups, self._adamw.state = (
            self._groups(muon=False),
            self.state,
        )  # loading replaces both
        self._adamw.step()
        for group in self._groups(muon=True):
            rounds = list(self._rounds(group))
            stages = (_Round.collect, _Round.orthogonalize, _Round.spread, _Round.apply)
            for tick in range(
                len(rounds) + len(stages) - 1
            ):  # while a round computes, the ones before and after it travel
                for lag, stage in enumerate(stages):
                    if 0 <= tick - lag < len(rounds):
                        stage(rounds[tick - lag])

    def _rounds(self, group: dict[str, Any]) -> Iterator["_Round"]:
        """The group's matrices by shape, each shape in rounds that hold about ROUND numbers for each rank."""
        matrices = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not matrices:
            return
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        ranks = Ranks.of(matrices[0])
        assert all(Ranks.of(matrix) == ranks for matrix in matrices), (
            "Muon's matrices must all lie over ranks in one way"
        )
        owners = balance(
            [tuple(matrix.shape) for matrix in matrices], ranks.replicas * ranks.shards
        )
        for shape in dict.fromkeys(matrix.shape for matrix in matrices):
            shares: list[list[Tensor]] = [[] for _ in range(ranks.replicas * ranks.shards)]
            for matrix, owner in zip(matrices, owners, strict=True):
                if matrix.shape == shape:
                    shares[owner].append(matrix)
            size = max(1, ROUND // shape.numel())
            for begin in range(0, max(map(len, shares)), size):
                yield _Round(
                    self, group, ranks, shape, [share[begin : begin + size] for share in shares]
                )


def balance(shapes: list[tuple[int, ...]], ranks: int) -> list[int]:
    """For each matrix the rank that makes it orthogonal: the costliest first, each to the rank with least to do."""
    loads, owners = [0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-newton_schulz_flops(shapes[i]), shapes[i])):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += newton_schulz_flops(shapes[i])
    return owners


class Ranks(NamedTuple):
    """How FSDP2 lays a matrix over ranks: `replicas` times whole, each time split by rows over `shards`; and where."""

    replicas: int = 1
    shards: int = 1
    replica: int = 0
    shard: int = 0
    over_replicas: dist.ProcessGroup | None = None
    over_shards: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, matrix: Tensor) -> "Ranks":
        if not isinstance(matrix, DTensor):
            return cls()
        mesh = matrix.device_mesh
        assert matrix.placements in ((Shard(0),), (Replicate(), Shard(0))), (
            f"Muon knows no placements {matrix.placements}"
        )
        over_shards = mesh.get_group(mesh.ndim - 1)
        if mesh.ndim == 1:
            return cls(1, mesh.size(), 0, mesh.get_local_rank(0), None, over_shards)
        return cls(
            mesh.size(0),
            mesh.size(1),
            mesh.get_local_rank(0),
            mesh.get_local_rank(1),
            mesh.get_group(0),
            over_shards,
        )

    def rows(self, total: int) -> list[int]:
        """Of each shard, as FSDP2 splits them: rounded up, so the last shards may have fewer or none."""
        each = -(-total // self.shards)
        return [max(0, min(each, total - shard * each)) for shard in range(self.shards)]


class _Round:
    """Matrices of one shape on their way through one update; shares holds those of each rank, replica by replica.

    collect: momentum; this rank's rows of its replica's matrices leave for their owners.
    orthogonalize: the rows that came are whole matrices; done, they leave for the ranks they came from.
    spread: this rank's rows of its replica's updates leave for the other replicas.  apply: all are there.
    """

    def __init__(
        self,
        optimizer: Muon,
        group: dict[str, Any],
        ranks: Ranks,
        shape: torch.Size,
        shares: list[list[Tensor]],
    ):
        self.optimizer, self.group, self.ranks, self.shape = optimizer, group, ranks, shape
        self.replicas = [shares[i : i + ranks.shards] for i in range(0, len(shares), ranks.shards)]
        self.like = _local(next(matrix for share in shares for matrix in share))  # for its device
        self.dtype = optimizer.dtype or (torch.bfloat16 if self.like.is_cuda else torch.float32)
        self.work: dist.Work | None = None  # under way
        self.data: Tensor  # what it brings

    def collect(self) -> None:
        momentum, mine, size = (
            self.group["momentum"],
            self.replicas[self.ranks.replica],
            self._numel(),
        )
        rows = self.like.new_empty(sum(map(len, mine)) * size, dtype=self.dtype)
        for shares in self.replicas:
            for i, matrix in enumerate(matrix for share in shares for matrix in share):
                gradient, buffer = (
                    _local(matrix.grad),
                    _local(self.optimizer.state[matrix]["momentum_buffer"]),
                )
                buffer.lerp_(gradient, 1 - momentum)
                if shares is mine:
                    rows[i * size : (i + 1) * size] = gradient.lerp(
                        buffer, momentum
                    ).flatten()  # Nesterov's
        self._exchange(rows, there=True)

    def orthogonalize(self) -> None:
        mine, columns = len(self._shares()[self.ranks.shard]), self.shape[1]
        rows = self.ranks.rows(self.shape[0])
        parts = self._arrived().split([mine * n * columns for n in rows])
        if not mine:
            return self._exchange(parts[0], there=False)
        whole = torch.cat(
            [part.view(mine, n, columns) for part, n in zip(parts, rows, strict=True)], 1
        )
        done = orthogonalize(whole, self.optimizer.coefficients)
        self._exchange(torch.cat([part.flatten() for part in done.split(rows, 1)]), there=False)

    def spread(self) -> None:
        self.data = self._arrived()
        if self.ranks.replicas > 1:
            counts = [sum(map(len, shares)) for shares in self.replicas]
            own = self.data.new_zeros(max(counts) * self._numel())  # all-gather wants equal sizes
            own[: len(self.data)] = self.data
            self.data = own.new_empty(self.ranks.replicas * len(own))
            parts = list(self.data.chunk(self.ranks.replicas))
            self.work = dist.all_gather(parts, own, self.ranks.over_replicas, async_op=True)

    def apply(self) -> None:
        lr, decay = self.group["lr"], self.group["weight_decay"]
        for shares, data in zip(
            self.replicas, self._arrived().chunk(self.ranks.replicas), strict=True
        ):
            for i, matrix in enumerate(matrix for share in shares for matrix in share):
                local = _local(matrix)
                local.mul_(1 - lr * decay)
                update = data[i * self._numel() : (i + 1) * self._numel()].view_as(local)
                local.add_(update, alpha=-lr * (RMS * max(self.shape) ** 0.5))
        del self.data

    def _shares(self) -> list[list[Tensor]]:
        """Of each shard of this replica."""
        return self.replicas[self.ranks.replica]

    def _numel(self) -> int:
        """Numbers of one matrix that lie on this rank."""
        return self.ranks.rows(self.shape[0])[self.ranks.shard] * self.shape[1]

    def _exchange(self, rows: Tensor, there: bool) -> None:
        """Start an all-to-all over this replica: from rows by owner to the owned by rows, or back."""
        by_owner = [len(share) * self._numel() for share in self._shares()]
        by_rows = [
            len(self._shares()[self.ranks.shard]) * n * self.shape[1]
            for n in self.ranks.rows(self.shape[0])
        ]
        sent, received = (by_owner, by_rows) if there else (by_rows, by_owner)
        self.data = rows
        if self.ranks.shards > 1:
            self.data = rows.new_empty(sum(received))
            self.work = dist.all_to_all_single(
                self.data, rows, received, sent, self.ranks.over_shards, async_op=True
            )

    def _arrived(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        self.work = None
        return self.data


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
