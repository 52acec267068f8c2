"""Muon for the matrices of the blocks, AdamW for all other parameters.

Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon; NorMuon, arXiv:2510.05491; MuonH,
arXiv:2606.16899.
With FSDP2, each matrix has one owner rank, which orthogonalizes it. An all-to-all sends its rows to
the owner and back; with HSDP, an all-gather sends the updates to the other replicas. No update is
computed twice.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.adamw import AdamW, decay_cautiously
from training.hyperball import partial_products, project, store_initial_norms
from training.shard_layout import ShardLayout, local

# Jordan's coefficients: singular values end in about 0.68 .. 1.20.
QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
# Polar Express (arXiv:2505.16932): five steps map singular values of at least 0.001 to about
# 0.85 .. 1.14. Inputs must be below 1 / 1.02 (bf16 rounding); the first step includes that scale.
POLAR_EXPRESS = (
    (8.156554524902461 / 1.02, -22.48329292557795 / 1.02**3, 15.878769915207462 / 1.02**5),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Singular values of at least 0.001 end within 0.2 % of 1: modded-nanogpt f411b3d3,
# records/track_3_optimization/train_gpt_simple.py.
QUINTIC12 = ((2.0, -1.5, 0.5),) * 12
COEFFICIENTS = {"polar_express": POLAR_EXPRESS, "quintic": QUINTIC, "quintic12": QUINTIC12}
RMS = 0.2  # RMS of an update divided by lr, about that of AdamW (arXiv:2502.16982)
# Elements that a rank orthogonalizes at once: enough to fill a GPU, with less memory than backward.
ROUND = 1 << 26


def orthogonalize(
    x: Tensor, coefficients: tuple[tuple[float, float, float], ...] = POLAR_EXPRESS
) -> Tensor:
    """Return approximately U V^T for each matrix U S V^T in x [n, rows, columns].

    Runs Newton-Schulz steps in x's dtype. A zero matrix stays zero.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def newton_schulz_flops(shape: tuple[int, ...], steps: int = len(POLAR_EXPRESS)) -> int:
    """Return the FLOPs of orthogonalize() for a parameter [..., rows, columns]."""
    m, n = sorted(shape[-2:])
    return steps * (4 * m * m * n + 2 * m**3) * math.prod(shape[:-2])


def update_scale(shape: tuple[int, ...], scale: str) -> float:
    """Return the factor of an orthogonalized update of a parameter [..., rows, columns].

    rms: the update gets the RMS of an AdamW update, so AdamW's lr applies (arXiv:2502.16982).
    spectral: Jordan's max(1, rows / columns)^0.5, for an lr of about 0.02.
    """
    rows, columns = shape[-2:]
    return float(RMS * max(shape[-2:]) ** 0.5 if scale == "rms" else max(1, rows / columns) ** 0.5)


def second_moment_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of NorMuon's second moment: per row, or per column of a wide matrix."""
    *stack, rows, columns = shape
    return (*stack, rows, 1) if rows >= columns else (*stack, 1, columns)


def normalizer(squares: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Return NorMuon's factors of an orthogonalized update, and update second_moment in place.

    squares: the update's mean squares, [..., rows, 1] or [..., 1, columns] as second_moment. The
    factors divide by the root of the moving average and keep the update's Frobenius norm.
    """
    second_moment.lerp_(squares, 1 - beta2)
    factors = second_moment.clamp(min=1e-10).rsqrt()
    before = squares.sum((-2, -1), keepdim=True)
    after = (squares * factors.square()).sum((-2, -1), keepdim=True)
    return factors * (before / after.clamp(min=1e-20)).sqrt()


class Muon(torch.optim.Optimizer):
    """Muon for parameter groups with "muon": True, torch's fused AdamW for the other groups.

    By default Muon's updates are scaled to AdamW's RMS (see update_scale), so both optimizers share
    `lr` and decoupled `weight_decay`. A parameter [n, rows, columns] of a Muon group is n matrices.
    Parameters are plain tensors or FSDP2's DTensors; with DTensors, step() is collective.
    coefficients and dtype apply to the Newton-Schulz steps; the default dtype is bfloat16 on a GPU
    and float32 on a CPU. normuon_beta2: decay of NorMuon's second moment; 0 turns NorMuon off.
    cautious, adam_every: see AdamW; cautious applies to the Muon groups, too. A Muon group with
    "hyperball": True has MuonH (hyperball.py): no weight decay, and `scale` has no effect.
    ValueError if a Muon group has a parameter that is not a matrix or a stack of matrices.
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
        scale: str = "rms",
        nesterov: bool = True,
        normuon_beta2: float = 0.0,
        cautious: bool = False,
        adam_every: int = 1,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "muon": False})
        for group in self.param_groups:
            if group["muon"]:
                group["momentum"] = momentum
                shapes = [tuple(parameter.shape) for parameter in group["params"]]
                invalid = [shape for shape in shapes if len(shape) not in (2, 3)]
                if invalid:
                    raise ValueError(
                        f"Muon takes matrices, not parameters of shape {invalid[0]}; "
                        "use AdamW for those"
                    )
        self.coefficients, self.dtype = coefficients, dtype
        self.scale, self.nesterov, self.cautious = scale, nesterov, cautious
        self.normuon_beta2 = normuon_beta2
        self._adamw = AdamW(self._groups(muon=False), lr, betas, eps, cautious, adam_every)

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. Collective if parameters are sharded."""
        assert closure is None
        # load_state_dict() replaces both.
        self._adamw.param_groups, self._adamw.state = self._groups(muon=False), self.state
        self._adamw.step()
        for group in self._groups(muon=True):
            rounds = list(self._rounds(group))
            stages = [_Round.collect, _Round.orthogonalize, _Round.spread]
            stages += [_Round.measure, _Round.project] if group.get("hyperball") else [_Round.apply]
            # Pipeline: one round computes while the previous and the next round communicate.
            for tick in range(len(rounds) + len(stages) - 1):
                for lag, stage in enumerate(stages):
                    if 0 <= tick - lag < len(rounds):
                        stage(rounds[tick - lag])

    def _rounds(self, group: dict[str, Any]) -> Iterator["_Round"]:
        """Yield rounds of matrices of one shape, each with about ROUND elements per rank."""
        matrices = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not matrices:
            return
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
                if self.normuon_beta2:  # small, so every rank holds a full copy
                    shape = second_moment_shape(matrix.shape)
                    state["second_moment"] = torch.zeros(shape, device=matrix.device)
        if group.get("hyperball"):
            store_initial_norms(self.state, matrices)
        layout = ShardLayout.from_tensor(matrices[0])
        # Equal meshes may have different objects for the same group.
        assert all(ShardLayout.from_tensor(matrix)[:4] == layout[:4] for matrix in matrices), (
            "all Muon matrices must have the same shard layout"
        )
        world_size = layout.replicas * layout.shards
        owners = balance([tuple(matrix.shape) for matrix in matrices], world_size)
        for shape in dict.fromkeys(matrix.shape for matrix in matrices):
            owned: list[list[Tensor]] = [[] for _ in range(world_size)]  # by owner rank
            for matrix, owner in zip(matrices, owners, strict=True):
                if matrix.shape == shape:
                    owned[owner].append(matrix)
            size = max(1, ROUND // shape.numel())
            for begin in range(0, max(map(len, owned)), size):
                batch = [share[begin : begin + size] for share in owned]
                yield _Round(self, group, layout, shape, batch)


def balance(shapes: list[tuple[int, ...]], ranks: int) -> list[int]:
    """Return the owner rank of each matrix: largest first, each to the least loaded rank."""
    loads, owners = [0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-newton_schulz_flops(shapes[i]), shapes[i])):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += newton_schulz_flops(shapes[i])
    return owners


class _Round:
    """One update of a batch of matrices of one shape. owned: matrices of each owner, by replica.

    collect: update momentum, send this rank's rows of its replica's matrices to their owners.
    orthogonalize: join the received rows into matrices, orthogonalize, send the rows back. For
        NorMuon the mean squares of the whole update follow its rows, as float32.
    spread: send this rank's rows of its replica's updates to the other replicas.
    apply: add the updates to the parameters.
    measure, project: Hyperball's stages in place of apply.
    """

    def __init__(
        self,
        optimizer: Muon,
        group: dict[str, Any],
        layout: ShardLayout,
        shape: torch.Size,
        owned: list[list[Tensor]],
    ):
        self.optimizer, self.group, self.layout, self.shape = optimizer, group, layout, shape
        self.replicas = [owned[i : i + layout.shards] for i in range(0, len(owned), layout.shards)]
        self.like = local(next(matrix for matrices in owned for matrix in matrices))  # its device
        self.dtype = optimizer.dtype or (torch.bfloat16 if self.like.is_cuda else torch.float32)
        squares = math.prod(second_moment_shape(shape)) if optimizer.normuon_beta2 else 0
        self.squares_size = squares * 4 // self.dtype.itemsize  # elements of dtype per update
        self.work: dist.Work | None = None  # the pending collective
        self.data: Tensor  # its output
        self.updates: list[tuple[Tensor, Tensor]]  # output of measure

    def collect(self) -> None:
        momentum, size, nesterov = self.group["momentum"], self._numel(), self.optimizer.nesterov
        local_owned = self._replica_matrices()
        rows = self.like.new_empty(sum(map(len, local_owned)) * size, dtype=self.dtype)
        for owned in self.replicas:
            for i, matrix in enumerate(matrix for matrices in owned for matrix in matrices):
                gradient = local(matrix.grad)
                buffer = local(self.optimizer.state[matrix]["momentum_buffer"])
                buffer.lerp_(gradient, 1 - momentum)
                if owned is local_owned:
                    direction = gradient.lerp(buffer, momentum) if nesterov else buffer
                    rows[i * size : (i + 1) * size] = direction.flatten()
        self._exchange(rows, to_owners=True)

    def orthogonalize(self) -> None:
        count = len(self._replica_matrices()[self.layout.shard])
        rows, row = self.layout.rows(self.shape[0]), self.shape[1:]
        blocks = self._wait().split([count * n * row.numel() for n in rows])
        if not count:
            return self._exchange(blocks[0], to_owners=False)
        matrices = torch.cat(
            [block.view(count, n, *row) for block, n in zip(blocks, rows, strict=True)], 1
        )
        updates = orthogonalize(matrices.flatten(0, -3), self.optimizer.coefficients)
        updates = updates.view(matrices.shape)
        outputs = [block.flatten(1) for block in updates.split(rows, 1)]
        if self.squares_size:
            wide = self.shape[-2] < self.shape[-1]
            squares = updates.float().square().mean(-2 if wide else -1)
            squares_as_dtype = squares.flatten(1).view(self.dtype)
            outputs = [torch.cat([block, squares_as_dtype], 1) for block in outputs]
        self._exchange(torch.cat([block.flatten() for block in outputs]), to_owners=False)

    def spread(self) -> None:
        self.data = self._wait()
        if self.layout.replicas > 1:
            counts = [sum(map(len, owned)) for owned in self.replicas]
            size = self._numel() + self.squares_size
            padded = self.data.new_zeros(max(counts) * size)  # all-gather: equal sizes
            padded[: len(self.data)] = self.data
            self.data = padded.new_empty(self.layout.replicas * len(padded))
            outputs = list(self.data.chunk(self.layout.replicas))
            self.work = dist.all_gather(outputs, padded, self.layout.replica_group, async_op=True)

    def apply(self) -> None:
        lr, decay = self.group["lr"], self.group["weight_decay"]
        scale = update_scale(self.shape, self.optimizer.scale)
        for matrix, update in self._updates():
            weight = local(matrix)
            if self.optimizer.cautious:
                decay_cautiously(weight, update, lr * decay)
            else:
                weight.mul_(1 - lr * decay)
            weight.add_(update, alpha=-lr * scale)
        del self.data

    def measure(self) -> None:
        """Sum the inner products of weights and updates over the shards."""
        self.updates = list(self._updates())
        parts = [
            partial_products(local(matrix), update, self.shape, self.layout)
            for matrix, update in self.updates
        ]
        self.data = torch.stack(parts)
        if self.layout.shards > 1:
            self.work = dist.all_reduce(self.data, group=self.layout.shard_group, async_op=True)

    def project(self) -> None:
        """Move the weights along their updates, and back to their initial norm."""
        for (matrix, update), products in zip(self.updates, self._wait(), strict=True):
            norm = self.optimizer.state[matrix]["initial_norm"]
            project(local(matrix), update, products, norm, self.group["lr"], self.layout)
        del self.data, self.updates

    def _updates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each matrix and this rank's rows of its update."""
        numel, size = self._numel(), self._numel() + self.squares_size
        updates = self._wait().chunk(self.layout.replicas)
        for owned, data in zip(self.replicas, updates, strict=True):
            for i, matrix in enumerate(matrix for matrices in owned for matrix in matrices):
                begin = i * size
                update = data[begin : begin + numel].view_as(local(matrix))
                if self.squares_size:
                    update = update * self._factors(matrix, data[begin + numel : begin + size])
                yield matrix, update

    def _factors(self, matrix: Tensor, squares: Tensor) -> Tensor:
        """Return NorMuon's factors of this rank's rows; update the second moment."""
        second_moment = self.optimizer.state[matrix]["second_moment"]
        squares = squares.clone().view(torch.float32).view_as(second_moment)
        factors = normalizer(squares, second_moment, self.optimizer.normuon_beta2)
        if len(factors) != self.shape[0]:  # one factor per column
            return factors
        return factors.split(self.layout.rows(self.shape[0]))[self.layout.shard]

    def _replica_matrices(self) -> list[list[Tensor]]:
        """Return the matrices that each shard of this rank's replica owns."""
        return self.replicas[self.layout.replica]

    def _numel(self) -> int:
        """Return the number of elements of one matrix on this rank."""
        return self.layout.rows(self.shape[0])[self.layout.shard] * self.shape[1:].numel()

    def _exchange(self, rows: Tensor, to_owners: bool) -> None:
        """Start an all-to-all in this replica: rows to the owners, or back to the shards."""
        owned = self._replica_matrices()
        squares = 0 if to_owners else self.squares_size
        by_owner = [len(matrices) * (self._numel() + squares) for matrices in owned]
        count, row = len(owned[self.layout.shard]), self.shape[1:].numel()
        by_shard = [count * (n * row + squares) for n in self.layout.rows(self.shape[0])]
        sent, received = (by_owner, by_shard) if to_owners else (by_shard, by_owner)
        self.data = rows
        if self.layout.shards > 1:
            self.data = rows.new_empty(sum(received))
            self.work = dist.all_to_all_single(
                self.data, rows, received, sent, self.layout.shard_group, async_op=True
            )

    def _wait(self) -> Tensor:
        """Wait for the pending collective, if any, and return its output."""
        if self.work is not None:
            self.work.wait()
        self.work = None
        return self.data
