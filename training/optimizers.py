"""Parameter groups by role, and their optimizers."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, check_fields, one_of
from training.adamw import AdamW
from training.fsdp_utils import DTYPES
from training.hyperball import frobenius_norms
from training.muon import COEFFICIENTS, Muon

# Roles of parameters, in the order of the optimizer's groups.
GROUPS = ("matrices", "embedding", "head", "vectors", "value_embeddings")
DECAYED = ("matrices", "head")  # groups with weight decay or Hyperball by default


@dataclass(frozen=True)
class GroupConfig:
    """Settings of one parameter group. None: as in the optim section."""

    lr: NonNegativeFloat = 1.0  # factor on optim.lr, not a rate
    beta1: Fraction | None = None  # AdamW's decay of the first moment
    beta2: Fraction | None = None  # AdamW's decay of the second moment
    eps: PositiveFloat | None = None  # AdamW's, added to the root of the second moment
    weight_decay: NonNegativeFloat | None = None  # default: 0 except for matrices and head
    hyperball: bool | None = None  # constant norms, see optim.hyperball; matrices and head only

    def __post_init__(self) -> None:
        check_fields(self, "optim.groups")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer's settings."""

    # The optimizer; muon: Muon for the matrices of the blocks, AdamW for the rest.
    name: Annotated[str, one_of("adamw", "muon")] = "adamw"
    lr: PositiveFloat = 1.0e-3  # learning rate at the peak of the schedule
    beta1: Fraction = 0.9  # AdamW's decay of the first moment
    beta2: Fraction = 0.95  # AdamW's decay of the second moment
    eps: PositiveFloat = 1.0e-8  # AdamW's, added to the root of the second moment
    momentum: Fraction = 0.95  # Muon's decay of the gradients' average
    weight_decay: NonNegativeFloat = 0.1  # decoupled, on matrices and head
    grad_clip: NonNegativeFloat = 1.0  # maximum global gradient norm; 0: no clipping
    z_weight: NonNegativeFloat = 1.0e-4  # weight of the mean squared logsumexp of the logits
    # Group (matrices, embedding, head, vectors, value_embeddings) -> its different settings.
    groups: dict[str, GroupConfig] = field(default_factory=dict)
    cautious_decay: bool = False  # decay only weights that the update shrinks, arXiv:2510.12402
    adam_every: PositiveInt = 1  # steps between updates of AdamW's groups beside Muon
    nesterov: bool = True  # Muon: Nesterov momentum
    # Muon: scale of updates. rms: as AdamW's. spectral: Jordan's, for a lr of about 0.02.
    muon_scale: Annotated[str, one_of("rms", "spectral")] = "rms"
    # Muon: polynomials of the Newton-Schulz iteration.
    muon_coefficients: Annotated[str, one_of(*COEFFICIENTS)] = "polar_express"
    # Muon: dtype of the Newton-Schulz iteration; auto: that of forward and backward.
    muon_dtype: Annotated[str, one_of("auto", *DTYPES)] = "auto"
    normuon_beta2: Fraction = 0.0  # decay of NorMuon's second moment, arXiv:2510.05491; 0: off
    # Constant norms of matrices and head in place of weight decay: AdamH, or MuonH for matrices
    # with name=muon (arXiv:2606.16899). lr is then the norm of an update relative to its matrix.
    hyperball: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        for name in self.groups:
            if name not in GROUPS:
                raise ValueError(
                    f"optim.groups.{name} is not a parameter group; there are {', '.join(GROUPS)}"
                )
        if self.name == "adamw" and self.adam_every > 1:
            raise ValueError(
                f"optim.adam_every={self.adam_every} needs optim.name=muon; "
                "with adamw, raise data.tokens_per_step"
            )
        if self.name == "muon" and "matrices" in self.groups:
            for name in ("beta1", "beta2", "eps"):
                if getattr(self.groups["matrices"], name) is not None:
                    raise ValueError(
                        f"optim.groups.matrices.{name} has no effect on Muon, which updates the "
                        "matrices; remove it"
                    )
        self._check_hyperball()

    def _check_hyperball(self) -> None:
        """ValueError for settings without effect under Hyperball, and for unsupported groups."""
        for name, group in self.groups.items():
            if group.hyperball and name not in DECAYED:
                raise ValueError(
                    f"optim.groups.{name}.hyperball: Hyperball is for {' and '.join(DECAYED)}; "
                    "remove it"
                )
        constant = [name for name in DECAYED if self.uses_hyperball(name)]
        void: list[tuple[str, Any, Any]] = [
            (f"groups.{name}.weight_decay", self.groups[name].weight_decay, 0)
            for name in constant
            if name in self.groups
        ]
        if len(constant) == len(DECAYED):
            void += [("weight_decay", self.weight_decay, 0)]
        if "matrices" in constant:
            void += [("muon_scale", self.muon_scale, "rms")]
        for key, value, harmless in void:
            if value not in (None, harmless):
                raise ValueError(
                    f"optim.{key}={value} has no effect with optim.hyperball, which keeps the "
                    f"norms of weights and updates constant; set optim.{key}={harmless}"
                )
        if constant and self.cautious_decay and not self.decays():
            raise ValueError(
                "optim.cautious_decay=true has no effect with optim.hyperball, where no group "
                "decays; set optim.cautious_decay=false"
            )

    def decays(self) -> bool:
        """True if any group has weight decay."""
        return any(group_settings(self, name)["weight_decay"] for name in GROUPS)

    def uses_hyperball(self, group: str) -> bool:
        """Return True if Hyperball updates the parameters of a group."""
        override = self.groups[group].hyperball if group in self.groups else None
        return group in DECAYED and (self.hyperball if override is None else override)


def group_of(name: str, parameter: Tensor) -> str:
    """Return the group of a parameter: one of GROUPS.

    embedding: the input embedding, including a tied head. value_embeddings: any other table of
    tokens or positions. vectors: norms, biases, scalars, gates and routers. matrices: all other
    parameters, including stacks of matrices [n, rows, columns].
    """
    words = name.split(".")
    if parameter.ndim < 2 or any(word.endswith(("gate", "lambdas", "router")) for word in words):
        return "vectors"
    if "embed_tokens" in words:
        return "embedding"
    if "lm_head" in words:
        return "head"
    if any("embed" in word for word in words):
        return "value_embeddings"
    return "matrices"


def group_settings(config: OptimConfig, name: str) -> dict[str, Any]:
    """Return the settings of a parameter group in the form of torch's param_groups.

    lr_factor: factor of the scheduled learning rate. lr: learning rate without a schedule.
    """
    group = config.groups.get(name, GroupConfig())
    decay = group.weight_decay
    if decay is None:
        decay = config.weight_decay if name in DECAYED else 0.0
    settings = {
        "name": name,
        "muon": config.name == "muon" and name == "matrices",
        "lr": config.lr * group.lr,
        "lr_factor": group.lr,
        "weight_decay": decay,
    }
    if config.uses_hyperball(name):
        settings |= {"hyperball": True, "weight_decay": 0.0}
    if settings["muon"]:
        return settings
    beta1 = config.beta1 if group.beta1 is None else group.beta1
    beta2 = config.beta2 if group.beta2 is None else group.beta2
    return settings | {"betas": (beta1, beta2), "eps": group.eps or config.eps}


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the model's parameters by role, in the order of GROUPS, without empty groups.

    ValueError if config.groups has a group that the model lacks.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():  # a tied head is listed once
        members[group_of(name, parameter)].append(parameter)
    members = {name: parameters for name, parameters in members.items() if parameters}
    for name in config.groups:
        if name not in members:
            raise ValueError(
                f"optim.groups.{name}: the model has no parameters of this group; "
                f"it has {', '.join(members)}"
            )
    ids = [id(parameter) for parameters in members.values() for parameter in parameters]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    return [
        {"params": parameters, **group_settings(config, name)}
        for name, parameters in members.items()
    ]


def build_optimizer(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype | None = None
) -> torch.optim.Optimizer:
    """Return fused AdamW, or Muon with AdamW, over parameter_groups.

    dtype: of Newton-Schulz if config.muon_dtype is auto; None: Muon's default.
    Collective with Hyperball and sharded parameters. ValueError if Hyperball has a zero matrix.
    """
    groups = parameter_groups(model, config)
    _check_norms(model, groups)
    betas = (config.beta1, config.beta2)
    if config.name == "adamw":
        return AdamW(groups, config.lr, betas, config.eps, config.cautious_decay)
    return Muon(
        groups,
        config.lr,
        config.momentum,
        betas,
        config.eps,
        coefficients=COEFFICIENTS[config.muon_coefficients],
        dtype=DTYPES.get(config.muon_dtype, dtype),
        scale=config.muon_scale,
        nesterov=config.nesterov,
        normuon_beta2=config.normuon_beta2,
        cautious=config.cautious_decay,
        adam_every=config.adam_every,
    )


def _check_norms(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Collective. ValueError if Hyperball would update a zero matrix, whose norm is constant."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in groups:
        if not group.get("hyperball"):
            continue
        for parameter, norms in zip(group["params"], frobenius_norms(group["params"]), strict=True):
            if not norms.all():
                raise ValueError(
                    f"optim.hyperball keeps the norm of {names[parameter]}, which is 0, so it "
                    "could not learn; initialize it with other values than 0, or set "
                    f"optim.groups.{group['name']}.hyperball=false"
                )
