"""The kinds of edit: what each does to which experts of which layer, as plain validated data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


Experts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_listed), Field(min_length=1)]


class Rows(BaseModel):
    """Which rows an edit touches; what is left out does not restrict.

    Attributes:
        phase: while reading the prompt ("prefill") or writing ("decode").
        positions: from the first to before the second position of a sequence; pads are not counted.
        batch: rows of the batch, when it is live.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Literal["prefill", "decode"] | None = None
    positions: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = None
    batch: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @property
    def everywhere(self) -> bool:
        """Whether all rows are meant, which is what a checkpoint can hold."""
        return self.phase is None and self.positions is None and self.batch is None


class _Edit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    layer: int | str
    """Model layer index, or site key where a layer has two routers."""
    rows: Rows = Rows()


class _OfExperts(_Edit):
    expert: Experts
    """Expert number or numbers."""


class Scale(_OfExperts):
    """Multiply by `factor` (RICE, arXiv 2505.14681): the logit, the score, the routing weight, or the routing weight
    with the token's sum of weights kept.
    """

    kind: Literal["scale"] = "scale"
    factor: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    stage: Literal["logit", "score", "weight", "weight_renormalised"] = "weight"


class Mask(_OfExperts):
    """Never select these experts: the family's own selection goes on among the others.

    Where weights are shares of a softmax over all experts and there is no selection bias, the others' shares grow by
    what the masked ones had, at every token, as if those were pruned.
    """

    kind: Literal["mask"] = "mask"


class Zero(_OfExperts):
    """Select these experts as ever and drop what they give out."""

    kind: Literal["zero"] = "zero"


class Prune(_OfExperts):
    """Remove these experts from the checkpoint; every MoE layer must lose as many. Live they are masked."""

    kind: Literal["prune"] = "prune"


class Merge(_OfExperts):
    """Put the weighted mean of these experts, the neurons of each aligned to the first's, in their place (MC-SMoE).

    With `keep="all"` each of them holds the mean, so that the router goes on as ever and any checkpoint can hold it.
    With `keep="first"` the first holds it and the others are never selected; written, they leave the checkpoint, and
    every MoE layer must lose as many.
    """

    kind: Literal["merge"] = "merge"
    expert: Annotated[Experts, Field(min_length=2)]
    """The members; the first is the dominant one, whose order of neurons the others are brought into."""
    weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None = None
    """How much of each is in the mean, such as its usage; divided by their sum. None: as much of each."""
    align: bool = True
    """Match the neurons first. Without it, neuron 1 is averaged with neuron 1."""
    keep: Literal["all", "first"] = "all"

    @property
    def gone(self) -> tuple[int, ...]:
        """Members that leave."""
        return self.expert[1:] if self.keep == "first" else ()

    @model_validator(mode="after")
    def _fits(self) -> Merge:
        if len(set(self.expert)) < len(self.expert):
            raise ValueError("an expert stands twice in one group")
        if self.weights is not None and (len(self.weights) != len(self.expert) or not sum(self.weights)):
            raise ValueError("give one weight for each expert, not all of them 0")
        if not self.rows.everywhere:
            raise ValueError("experts are merged for all rows; leave out rows")
        return self


class Promote(_OfExperts):
    """Always select these experts, scored just above the best other (SteerMoE, arXiv 2509.09660)."""

    kind: Literal["promote"] = "promote"


class Demote(_OfExperts):
    """Score these experts just below the worst other: selected only where nothing else is left (SteerMoE)."""

    kind: Literal["demote"] = "demote"


class Route(_Edit):
    """Let only some of a token's selected experts count: by rank, the first `top_k`, or the first that reach `top_p`.

    With `renormalise` a token's weights keep their sum.
    """

    kind: Literal["route"] = "route"
    ranks: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    renormalise: bool = True

    @model_validator(mode="after")
    def _one_rule(self) -> Route:
        if sum(rule is not None for rule in (self.ranks, self.top_k, self.top_p)) != 1:
            raise ValueError("give one of ranks, top_k and top_p")
        return self


class Replace(_OfExperts):
    """Put other tensors in the place of these experts' own and, where the file holds it, of their layer's router.

    The tensors lie in a safetensors file beside the recipe, by parameter: ``path``, or ``path[7]`` for one place along
    the first dimension of a fused one. `Recipe.tensors` reads them, and refuses a file that is not the one meant.
    """

    kind: Literal["replace"] = "replace"
    file: Annotated[str, Field(pattern=r"^[\w][\w.-]*\.safetensors$")]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    """blake2b-128 of the file."""

    @model_validator(mode="after")
    def _everywhere(self) -> Replace:
        if not self.rows.everywhere:
            raise ValueError("tensors are replaced for all rows; leave out rows")
        return self


Edit = Annotated[Scale | Mask | Zero | Prune | Merge | Promote | Demote | Route | Replace, Field(discriminator="kind")]
