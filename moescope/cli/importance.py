"""`moescope importance` and `moescope super-experts`: criteria that need the model, and what removing experts does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moescope.cli import screen
from moescope.cli.editing import ModelOption
from moescope.cli.models import Device, Dtype, Json, Revision, Trust
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import xarray as xr

    from moescope.hooks import Model
    from moescope.store import Store

IMPORTANCE_EXAMPLES = """Examples:

\b
  moescope importance --store runs/demo --data texts.jsonl --label domain
  moescope importance --store runs/demo --data texts.jsonl --n 4 --criterion reap --criterion frequency --html c.html
  moescope importance --store runs/demo --calibration some.jsonl --heapr --naee --table --csv importance.csv
  moescope importance --model olmoe-sft --before olmoe --store runs/sft --table --json"""

SUPER_EXAMPLES = """Examples:

\b
  moescope super-experts --store runs/demo --data texts.jsonl --label domain
  moescope super-experts --store runs/demo --data texts.jsonl --definition code --controls 50 --html super.html"""

Kind = Literal["mask", "zero"]
StoreOption = Annotated[Path, typer.Option(help="A store of this model.")]
Html = Annotated[Path | None, typer.Option(help="Write the figure to this HTML file; it works offline.")]
Csv = Annotated[Path | None, typer.Option(help="Write the table to this CSV file.")]
Label = Annotated[str | None, typer.Option(help="Label of the corpus to tell apart.")]
Limit = Annotated[int | None, typer.Option(help="Only so many documents of the corpus.")]


def importance(
    store: StoreOption,
    model: ModelOption = "tiny-qwen-moe",
    data: Annotated[
        Path | None, typer.Option(help="Corpus to measure the loss on: other texts than the store's.")
    ] = None,
    label: Label = None,
    limit: Limit = None,
    calibration: Annotated[Path | None, typer.Option(help="Corpus for --heapr and --naee.")] = None,
    heapr: Annotated[bool, typer.Option("--heapr", help="Add HEAPr (a backward pass over --calibration).")] = False,
    naee: Annotated[bool, typer.Option("--naee", help="Add NAEE (each layer's block over sets of experts).")] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Add the effect of masking each expert alone on --data.")
    ] = False,
    before: Annotated[str | None, typer.Option(help="Add the change of router rows since this checkpoint.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only the table of criteria; mask nothing.")] = False,
    criterion: Annotated[list[str] | None, typer.Option(help="Test only this one; may be given again.")] = None,
    n: Annotated[int, typer.Option(help="Experts to silence in each layer, at either end; also of --naee.")] = 1,
    do: Annotated[Kind, typer.Option(help="mask: others take the expert's place; zero: nothing does.")] = "mask",
    controls: Annotated[int, typer.Option(help="Sets of random experts, an even number.")] = 40,
    csv: Csv = None,
    html: Html = None,
    seed: Annotated[int, typer.Option(help="Of controls and intervals.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Rank experts by every criterion, mask the lowest and highest of each, and see which criterion knew."""
    if data is None and not table:
        raise MoescopeError("Say what to measure the loss on with --data, or ask for the --table of criteria alone.")
    if (heapr or naee) and calibration is None:
        raise MoescopeError("--heapr and --naee need texts: name them with --calibration.")
    if alone and data is None:
        raise MoescopeError("--alone needs texts: name them with --data.")
    _require_folders(csv, html)
    opened = _opened(store)
    screen.quiet_transformers()
    from moescope import analysis
    from moescope.capturing import Corpus
    from moescope.effects import criteria_effects, expert_effects, router_change
    from moescope.hooks import load

    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _require_same(opened, loaded, store)
    corpus = None if data is None else Corpus(data, [label] if label else [], limit=limit)
    extra: dict[str, Any] = {}
    if calibration is not None:
        extra |= _of_model(loaded, Corpus(calibration, limit=limit), heapr, naee, n, seed)
    if before is not None:
        extra["router_change"] = router_change(load(before, dtype=dtype, device=device), loaded)["router_change"]
    if alone and corpus is not None:
        total = corpus.census().documents
        with screen.counting(total, f"{total} documents, each expert masked alone") as advance:
            effect = expert_effects(loaded, corpus, seed=seed, on_progress=advance)["effect"]
        extra["effect"] = effect.isel(label=0, drop=True)
    found = analysis.importance(opened, extra=extra, seed=seed)
    if table or corpus is None:
        _show(found, json, csv, html)
        return
    _say_same(found, corpus, json)
    documents = corpus.census().documents
    with screen.counting(0, f"{documents} documents, {controls} controls") as advance:
        tested = [name for name in map(str, found["criterion"].values) if name != "effect"]
        result = criteria_effects(
            loaded, corpus, found, criterion or tested, n, by=label, kind=do, controls=controls, seed=seed,
            on_progress=advance,
        )  # fmt: skip
    _show(result, json, csv, html)


def super_experts(
    store: StoreOption,
    data: Annotated[Path, typer.Option(help="Corpus to measure on.")],
    model: ModelOption = "tiny-qwen-moe",
    label: Label = None,
    limit: Limit = None,
    definition: Annotated[Literal["paper", "code"], typer.Option(help="Whose rule names them.")] = "paper",
    do: Annotated[Kind, typer.Option(help="zero: its output is dropped; mask: others take its place.")] = "zero",
    controls: Annotated[int, typer.Option(help="Random recipes to hold it against.")] = 20,
    csv: Csv = None,
    html: Html = None,
    seed: Annotated[int, typer.Option(help="Of controls and intervals.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Find the super experts of a store, silence them, and see what becomes of loss, attention sinks and residual."""
    _require_folders(csv, html)
    opened = _opened(store)
    screen.quiet_transformers()
    from moescope import analysis
    from moescope.capturing import Corpus
    from moescope.effects import super_expert_effects
    from moescope.hooks import load

    found = analysis.super_experts(opened, definition=definition)
    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _require_same(opened, loaded, store)
    corpus = Corpus(data, [label] if label else [], limit=limit)
    with screen.counting(0, f"{corpus.census().documents} documents x up to {2 + controls} recipes") as advance:
        result = super_expert_effects(
            loaded, corpus, found, by=label, kind=do, controls=controls, seed=seed, on_progress=advance
        )
    if not json:
        screen.say(f"silenced: {result.attrs['edits']}")
    _show(result, json, csv, html, ["model_layer"])


def _of_model(model: Model, corpus: Any, heapr: bool, naee: bool, n: int, seed: int) -> dict[str, Any]:
    from moescope import effects

    found: dict[str, Any] = {}
    if heapr:
        with screen.counting(0, f"{corpus.census().documents} documents, gradients") as advance:
            atoms = effects.heapr(model, corpus, seed=seed, on_progress=advance)
        found |= {name: atoms[name] for name in ("heapr", "heapr_total")}
    if naee:
        with screen.counting(len(model.sites), f"{len(model.sites)} layers, sets of {n} experts") as advance:
            found["naee"] = effects.naee(model, corpus, n, seed=seed, on_progress=advance)["naee"]
    return found


def _opened(folder: Path) -> Store:
    from moescope.store import Store

    return Store.open(folder)


def _require_same(store: Store, model: Model, folder: Path) -> None:
    if store.manifest.model.weights_fingerprint not in (None, model.weights_fingerprint):
        raise MoescopeError(
            f"{folder} was captured from other weights ({store.manifest.model.name}) than {model.name}."
        )


def _require_folders(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise MoescopeError(f"There is no folder {file.parent} to write {file.name} into.")


def _say_same(found: xr.Dataset, corpus: Any, json: bool) -> None:
    if not json and str(found.attrs["corpus"]) == str(corpus.name).rpartition("/")[2]:
        screen.say("note: the store is of this corpus too; criteria that fit their sample look better than they are")


def _show(result: xr.Dataset, json: bool, csv: Path | None, html: Path | None, also: list[str] | None = None) -> None:
    from moescope.analysis import table
    from moescope.analysis.spreadsheets import write_csv

    rows = table(result)
    if csv is not None:
        write_csv(rows, csv)
    if html is not None:
        from moescope.figures import draw, save

        save(draw(result), html)
    more = table(result, also) if also else None
    if json:
        answer = {"attrs": result.attrs, "rows": rows.to_dict("records")}
        screen.print_json(answer | ({} if more is None else {"layers": more.to_dict("records")}))
        return
    for path in (csv, html):
        if path is not None:
            screen.say(f"{path} is written")
    if csv is None:
        screen.say("loss in nats per token; controls: random experts of the same layers" * ("plain" in result))
        for frame in (rows, more):
            if frame is not None:
                shown = frame.loc[:, [c for c in frame.columns if not str(c).endswith(("_low", "_high"))]]
                numbers = [str(c) for c in shown.columns if shown[c].dtype.kind in "if"]
                cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in shown.to_numpy()]
                screen.table([str(c) for c in shown.columns], cells, numbers)
