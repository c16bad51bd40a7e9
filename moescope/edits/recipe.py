"""A recipe: edits with where they came from, as YAML or JSON; live on a model or written into a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from moescope.edits import suggested
from moescope.edits.edit import Edit, Merge, Replace
from moescope.edits.suggested import Silence, Stage
from moescope.edits.together import require_consistent, require_enough
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import torch
    import xarray as xr

    from moescope.edits.checkpoint import Written
    from moescope.hooks import Model
    from moescope.hooks.interventions import Act


class Recipe(BaseModel):
    """Edits in the order in which they act.

    Attributes:
        edits: the edits.
        schema_version: of this format.
        config_hash: the model they are for (`Model.config_hash`); another model's recipe is refused. None: any model.
        suggested_by: which analysis of which store suggested them, and how.
        note: a person's words.
    """

    model_config = ConfigDict(extra="forbid")

    edits: list[Edit] = Field(min_length=1)
    schema_version: Literal[1] = 1
    config_hash: str | None = None
    suggested_by: dict[str, Any] = Field(default_factory=dict)
    note: str = ""
    _held: dict[str, Any] = PrivateAttr(default_factory=dict)
    _folder: Path | None = PrivateAttr(default=None)

    def __init__(self, edits: Iterable[Any] = (), /, **more: Any) -> None:
        given = more.pop("edits", None)
        try:
            super().__init__(edits=list(edits) if given is None else given, **more)
        except ValidationError as error:
            raise MoescopeError(f"Not a recipe: {_first(error)}") from error

    def acts(self, model: Model) -> dict[str, list[Act]]:
        """What these edits are at each site of a model.

        Raises:
            MoescopeError: another model's recipe, an unknown layer, or edits that contradict each other.
        """
        from moescope.hooks.interventions import Act, Where

        if self.config_hash is not None and self.config_hash != model.config_hash:
            raise MoescopeError(
                "This recipe was made for another model (its configuration differs); set config_hash to null in it to "
                "use it all the same."
            )
        self.require_consistent()
        found: dict[str, list[Act]] = {}
        merges: dict[str, list[Merge]] = {}
        of_site: dict[str, list[Any]] = {}
        for edit in self.edits:
            sites = [site for site in model.sites if edit.layer in (site.layer, site.key)]
            if not sites:
                known = ", ".join(str(site.layer) for site in model.sites)
                raise MoescopeError(f"The model has no MoE layer {edit.layer!r}; it has {known}.")
            if len(sites) > 1:
                keys = ", ".join(site.key for site in sites)
                raise MoescopeError(f"Layer {edit.layer} has several routers; name one: {keys}.")
            of_site.setdefault(sites[0].key, []).append(edit)
            where = Where(edit.rows.batch, edit.rows.positions, edit.rows.phase)
            if isinstance(edit, Merge):
                merges.setdefault(sites[0].key, []).append(edit)
                continue
            if isinstance(edit, Replace):
                act = Act("replace", edit.expert, tensors=self.tensors(edit))
            else:
                act = _act(edit, where, model.semantics[sites[0].key].top_k)
            found.setdefault(sites[0].key, []).append(act)
        for key, some in merges.items():
            found.setdefault(key, []).extend(_merging(model, key, some))
        for site in model.sites:
            edits = of_site.get(site.key, [])
            require_consistent(edits, one_site=True)
            require_enough(edits, site.layer, site.n_experts, model.semantics[site.key].top_k)
        return found

    def require_consistent(self) -> None:
        """Raises MoescopeError where two edits of the same rows contradict each other."""
        require_consistent(self.edits)

    @classmethod
    def by_row(cls, recipes: Sequence[Recipe | None]) -> Recipe:
        """One recipe that lets each of several act on its own row of a batch: the n-th on row n; None leaves it alone.

        Raises:
            MoescopeError: none of them edits anything, they are for different models, or one cannot be held to a row.
        """
        edits, hashes = [], {each.config_hash for each in recipes if each is not None} - {None}
        if len(hashes) > 1:
            raise MoescopeError("These recipes were made for different models; they cannot share a batch.")
        for row, recipe in enumerate(recipes):
            for edit in [] if recipe is None else recipe.edits:
                if edit.rows.batch is not None:
                    raise MoescopeError(f"Recipe {row}, layer {edit.layer}: it names its rows of the batch already.")
                if edit.kind in ("replace", "prune", "merge"):
                    raise MoescopeError(f"Recipe {row}, layer {edit.layer}: {edit.kind} is for all rows alike.")
                edits.append(edit.model_copy(update={"rows": edit.rows.model_copy(update={"batch": (row,)})}))
        if not edits:
            raise MoescopeError("None of these recipes edits anything.")
        return cls(edits, config_hash=next(iter(hashes), None), note="recipes by row")

    def holding(self, tensors: dict[str, dict[str, torch.Tensor]]) -> Recipe:
        """The same recipe with the tensors of its `Replace` edits in memory, by file name."""
        copy = self.model_copy()
        copy._held = self._held | tensors
        return copy

    def tensors(self, edit: Replace) -> dict[str, torch.Tensor]:
        """What a `Replace` edit puts in place, by part of a parameter: from memory, or from the file beside the recipe.

        Raises:
            MoescopeError: the file is not there, or is not the one that the recipe means.
        """
        from moescope.edits.replacing import read

        if edit.file not in self._held:
            self._held[edit.file] = read(self._folder, edit)
        return self._held[edit.file]

    def save(self, path: str | Path, *, tensors: bool = True) -> Path:
        """Write it as YAML, or as JSON where the name ends so; files of tensors are written beside it.

        Args:
            path: the file.
            tensors: False leaves the files of tensors away, where a checkpoint holds them anyway.
        """
        file = Path(path)
        if tensors:
            self._save_tensors(file.parent)
        try:
            file.write_text(self.text(as_json=file.suffix == ".json"), encoding="utf-8")
        except OSError as error:
            raise MoescopeError(f"Cannot write {file}: {error.strerror or error}.") from error
        return file

    def text(self, *, as_json: bool = False) -> str:
        """What `save` writes, YAML or JSON."""
        data = self.model_dump(mode="json", exclude_defaults=False)
        return json.dumps(data, indent=2) + "\n" if as_json else yaml.safe_dump(data, sort_keys=False)

    def _save_tensors(self, folder: Path) -> None:
        for edit in self.edits:
            if isinstance(edit, Replace):
                from moescope.edits.replacing import save

                save(folder, edit, self.tensors(edit))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from YAML or JSON.

        Raises:
            MoescopeError: no such file, or what is wrong in it and where.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MoescopeError(
                f"Cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}."
            ) from error
        recipe = cls.of_text(text, str(path))
        if any(isinstance(edit, Replace) for edit in recipe.edits):
            recipe._folder = Path(path).parent
        return recipe

    @classmethod
    def of_text(cls, text: str, name: str = "This text") -> Recipe:
        """A recipe from YAML or JSON.

        Args:
            text: the whole of it.
            name: what it is called where something is wrong in it.

        Raises:
            MoescopeError: what is wrong in it and where.
        """
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none; nested too deeply
            raise MoescopeError(f"{name} is neither YAML nor JSON: {str(error).splitlines()[0]}.") from error
        if not isinstance(data, dict):
            raise MoescopeError(f"{name} is not a recipe: expected a mapping with `edits`.")
        try:
            return cls(**data)
        except TypeError as error:
            raise MoescopeError(f"{name} is not a recipe: {error}.") from error
        except MoescopeError as error:
            raise MoescopeError(f"{name}: {error}") from error

    def write(self, source: str | Path, out: str | Path, **options: Any) -> Written:
        """Write an edited copy of a checkpoint; see `moescope.edits.write`."""
        from moescope.edits.checkpoint import write

        return write(self, source, out, **options)

    @classmethod
    def from_npmi(
        cls, result: xr.Dataset, label: str, top: int = 2, factor: float = 64.0, stage: Stage = "weight"
    ) -> Recipe:
        """RICE's recipe: scale the `top` experts of the whole model with the highest nPMI for a label.

        Args:
            result: from `analysis.npmi`.
            label: whose experts.
            top: how many; the paper takes 2.
            factor: the paper's beta, 64.
            stage: of the scaling; the paper leaves it open.
        """
        edits, source = suggested.by_npmi(result, label, top, factor, stage)
        return cls(edits, suggested_by=source, config_hash=result.attrs.get("config_hash"))

    @classmethod
    def from_cognitive_experts(
        cls, result: xr.Dataset, top: int = 2, factor: float = 64.0, stage: Stage = "weight"
    ) -> Recipe:
        """RICE (arXiv 2505.14681): scale the two experts of the whole model that go most with the markers of thinking.

        Args:
            result: from `analysis.npmi_markers`; of several markers, all taken together.
            top, factor, stage: as in `from_npmi`.
        """
        edits, source = suggested.by_cognitive_experts(result, top, factor, stage)
        return cls(edits, suggested_by=source, config_hash=result.attrs.get("config_hash"))

    @classmethod
    def from_risk_difference(cls, result: xr.Dataset, label: str, promote: int = 0, demote: int = 0) -> Recipe:
        """SteerMoE's recipe: promote the experts most tied to a label, demote those most tied to the others.

        Args:
            result: with `risk_difference` by label, such as `analysis.npmi` gives, or from `analysis.risk_difference`.
            label: whose behaviour is wanted; of two sets, the name of one.
            promote, demote: how many experts of the whole model.
        """
        edits, source = suggested.by_risk_difference(result, label, promote, demote)
        return cls(edits, suggested_by=source, config_hash=result.attrs.get("config_hash"))

    @classmethod
    def from_importance(cls, result: xr.Dataset, criterion: str, lowest: int, kind: Silence = "mask") -> Recipe:
        """Mask (or zero) the experts that matter least by one criterion of an importance table.

        Args:
            result: a Dataset with a variable (layer, expert) of that name.
            criterion: the variable.
            lowest: how many experts of the whole model.
            kind: what to do with them.
        """
        edits, source = suggested.by_importance(result, criterion, lowest, kind)
        return cls(edits, suggested_by=source, config_hash=result.attrs.get("config_hash"))

    @classmethod
    def from_groups(cls, result: xr.Dataset, keep: Literal["all", "first"] = "all", align: bool = True) -> Recipe:
        """MC-SMoE's recipe: merge each group of experts by usage; experts alone in their group stay as they are.

        Args:
            result: from `analysis.expert_groups`.
            keep: "all" leaves the number of experts, "first" only the dominant ones (grouped with scope="layer").
            align: match neurons before they are averaged.

        Raises:
            MoescopeError: not such a result, or no group of more than one.
        """
        edits, source = suggested.by_groups(result, keep, align)
        return cls(edits, suggested_by=source, config_hash=result.attrs.get("config_hash"))

    @classmethod
    def from_super_experts(cls, result: xr.Dataset, kind: Silence = "zero") -> Recipe:
        """Silence the super experts that `analysis.super_experts` found.

        Raises:
            MoescopeError: it found none.
        """
        edits, source = suggested.by_super_experts(result, kind)
        return cls(edits, suggested_by=source, config_hash=result.attrs.get("config_hash"))


def _merging(model: Model, key: str, merges: list[Merge]) -> list[Act]:
    from moescope.edits.merging import merged_tensors
    from moescope.hooks.interventions import Act

    site = next(site for site in model.sites if site.key == key)
    members = tuple(expert for merge in merges for expert in merge.expert)
    gone = tuple(expert for merge in merges for expert in merge.gone)
    acts = [Act("replace", members, tensors=merged_tensors(model, site, merges))]
    return acts + [Act("remove", gone)] * bool(gone)


def _act(edit: Any, where: Any, top_k: int) -> Act:
    from moescope.hooks.interventions import Act

    if edit.kind == "scale":
        return Act("scale", edit.expert, edit.factor, edit.stage, where=where)
    if edit.kind != "route":
        return Act("remove" if edit.kind == "prune" else edit.kind, edit.expert, where=where)
    if edit.top_p is not None:
        return Act("top_p", factor=edit.top_p, renormalise=edit.renormalise, where=where)
    ranks = edit.ranks
    if edit.top_k is not None:
        if edit.top_k > top_k:
            raise MoescopeError(f"Layer {edit.layer} selects {top_k} experts; the first {edit.top_k} are not there.")
        ranks = tuple(range(edit.top_k))
    return Act("ranks", ranks=ranks, renormalise=edit.renormalise, where=where)


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg']}"
