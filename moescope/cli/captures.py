"""Commands that run a model: capture, and the demonstration of everything on the bundled one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli import screen
from moescope.cli.models import Device, Dtype, Json, Revision, Trust, complete_model

if TYPE_CHECKING:
    from moescope.capturing import Activations
    from moescope.store import Store

CAPTURE_EXAMPLES = """Examples:

\b
  moescope capture --model qwen-moe --data texts.jsonl --label domain --out runs/x
  moescope capture --model tiny-qwen-moe --data book.txt --sample-by paragraph --out runs/book
  moescope capture --model ./my-checkpoint --data corpus.parquet --tier routing --tier logits --loss --out runs/y
  moescope capture --model qwen-moe --data texts.jsonl --vectors outputs --vector-layer 3 --out runs/v
  moescope capture --model qwen-moe --data prompts.jsonl --generate 64 --out runs/z    also what it writes
  moescope capture --model qwen-moe --data chats.jsonl --chat messages --generate 64 --out runs/c
  moescope capture --model qwen-moe --data texts.jsonl --recipe recipe.yaml --out runs/edited    under edits
  moescope capture … --out runs/x --resume       go on after Ctrl-C or a crash"""

DEMO_EXAMPLES = """Examples:

\b
  moescope demo
  moescope demo --out runs/demo"""


def capture(
    model: Annotated[
        str, typer.Option(help="Alias (see `moescope models`), hub id or folder.", autocompletion=complete_model)
    ],
    data: Annotated[Path, typer.Option(help="Corpus: .jsonl, .txt or .parquet, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder of the new store.")],
    label: Annotated[list[str] | None, typer.Option(help="Field to keep as a label; repeat for several.")] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(help="routing, logits, experts, outliers or activations; repeat (default: routing and outliers)."),
    ] = None,
    text: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    chat: Annotated[
        str | None, typer.Option(help="Field that holds a conversation, for the model's chat template to write out.")
    ] = None,
    sample_by: Annotated[
        str, typer.Option(help="A document in a .txt file is a line, a paragraph or the document.")
    ] = "line",
    limit: Annotated[int | None, typer.Option(help="Use only the first so many documents.")] = None,
    loss: Annotated[bool, typer.Option("--loss", help="Also store each token's loss.")] = False,
    sinks: Annotated[
        bool, typer.Option("--sinks", help="Also store how much attention each head puts on the first token.")
    ] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens of context; longer documents are cut.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of one forward pass.")] = 8192,
    compress_logits: Annotated[bool, typer.Option("--compress-logits", help="Compress the logits tier.")] = False,
    vectors: Annotated[
        list[str] | None, typer.Option(help="Of the activations tier: outputs, neurons or router_inputs; repeat.")
    ] = None,
    vector_layer: Annotated[list[int] | None, typer.Option(help="… of this layer only; repeat.")] = None,
    vector_expert: Annotated[list[int] | None, typer.Option(help="… of this expert only; repeat.")] = None,
    vector_sample: Annotated[float, typer.Option(help="… of this share of the tokens.")] = 0.01,
    vector_limit: Annotated[float, typer.Option(help="… and at most so many GB.")] = 1.0,
    generate: Annotated[
        int | None, typer.Option(help="Let the model write so many tokens after each document, and capture those too.")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="With --generate: sample, instead of the likeliest.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Of --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of --sample: nucleus.")] = None,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    recipe: Annotated[Path | None, typer.Option(help="Capture under these edits (YAML or JSON).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted capture in --out.")] = False,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Store which experts every token of a corpus went to.

    Says first what it will cost. Ctrl-C leaves a store that opens; --resume goes on from there.
    """
    from moescope.capturing import DEFAULT_TIERS, TIERS, Corpus
    from moescope.capturing import capture as run
    from moescope.capturing.run import require_new
    from moescope.errors import MoescopeError

    if sample_by not in ("line", "paragraph", "document"):
        raise MoescopeError(f"Unknown --sample-by {sample_by!r}: choose line, paragraph or document.")
    unknown = [name for name in tier or [] if name not in TIERS]
    if unknown:
        raise MoescopeError(f"Unknown tier {unknown[0]!r}. Tiers are {', '.join(TIERS)}.")
    corpus = Corpus(data, label or [], text=text, chat=chat, sample_by=sample_by, limit=limit)  # type: ignore[arg-type]
    # What can be refused without the model is refused before minutes go into loading it.
    require_new(out, resume)
    corpus.census()
    screen.quiet_transformers()
    from moescope.edits import Recipe
    from moescope.hooks import load

    edits = None if recipe is None else Recipe.load(recipe)
    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with nullcontext() if edits is None else loaded.edited(edits), screen.capture_bar() as bar:
        try:
            store = run(
                loaded,
                corpus,
                out,
                tier or DEFAULT_TIERS,
                loss=loss,
                sinks=sinks,
                max_length=max_length,
                batch_tokens=batch_tokens,
                compress_logits=compress_logits,
                activations=_vectors(vectors, vector_layer, vector_expert, vector_sample, vector_limit),
                generate=_generation(generate, sample, temperature, top_p, seed),
                resume=resume,
                on_forecast=bar.forecast,
                on_progress=bar.advance,
            )
        except KeyboardInterrupt:
            bar.finish()
            screen.interrupted(f"Stopped. What was captured is in {out}; go on with the same command and --resume.")
    if json:
        screen.print_json({"store": str(out), "tokens": store.n_tokens, "documents": store.n_documents})
        return
    screen.say(f"{store.n_tokens:,} tokens of {store.n_documents:,} documents are in {out}")
    screen.say(f"next: moescope report {out}")


def _vectors(
    kinds: list[str] | None, layers: list[int] | None, experts: list[int] | None, sample: float, limit: float
) -> Activations | None:
    """The activations tier of the command line, if any of it was asked for."""
    from moescope.capturing import Activations

    if kinds is None and layers is None and experts is None:
        return None
    return Activations(kinds or ["outputs"], layers, experts, sample, max_bytes=int(limit * 1e9))


def _generation(
    n: int | None, sample: bool, temperature: float | None, top_p: float | None, seed: int
) -> dict[str, Any] | None:
    """The generation options of the command line, those that were given."""
    from moescope.errors import MoescopeError

    chosen = {"temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in chosen.items() if value is not None}
    if n is None:
        if sample or given:
            raise MoescopeError("--sample, --temperature and --top-p say how to write; add --generate N.")
        return None
    if given and not sample:
        raise MoescopeError("--temperature and --top-p are for --sample.")
    return {"max_new_tokens": n, "do_sample": sample, "seed": seed, **given}


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demonstration's store.")] = Path("runs/demo"),
) -> None:
    """Show it all on the bundled model, in a few minutes.

    Captures the bundled trained model on the bundled corpus, analyses it, says what was found and where to look.
    """
    from moescope.analysis import findings
    from moescope.capturing import TIERS, Corpus
    from moescope.capturing import capture as run
    from moescope.data import CORPUS
    from moescope.report import write

    screen.quiet_transformers()
    from moescope.hooks import load
    from moescope.hooks.aliases import BUNDLED

    loaded, corpus = load(BUNDLED, dtype="float32"), Corpus(CORPUS, ["domain"])
    screen.say(f"{loaded!r}; logits are bit-identical under capture")
    store = _finished(out, loaded.weights_fingerprint, corpus.census().hash)
    if store is None:
        resume = (out / "manifest.json").exists()
        with screen.capture_bar() as bar:
            store = run(
                loaded, corpus, out, TIERS, loss=True, resume=resume, on_forecast=bar.forecast, on_progress=bar.advance
            )
    else:
        screen.say(f"{out} is captured already: {store.n_tokens:,} tokens of {store.n_documents:,} documents")
    screen.say()
    screen.heading("What this model does with its experts")
    for number, finding in enumerate(findings(store), 1):
        screen.heading(f"\n{number}. {finding.headline}")
        screen.say(f"   {finding.detail}")
    page = out / "report.html"
    write(store, page)
    screen.say()
    screen.say(f"The report, with every figure and how to read it: {page}  (open it in a browser; it works offline)")
    screen.say(f"The store: {out}  (`moescope info {out}`, or moescope.open({str(out)!r}) in Python)")
    screen.say(f"To click through it: moescope app {out}")


def _finished(out: Path, weights: str, corpus: str) -> Store | None:
    """The demonstration's store, if it is there and complete; an error if the folder holds another one."""
    from moescope.errors import StoreError
    from moescope.store import Store

    if not (out / "manifest.json").exists():
        return None
    store = Store.open(out)
    if (store.manifest.model.weights_fingerprint, store.manifest.corpus.hash) != (weights, corpus):
        raise StoreError(f"{out} holds a capture of another model or corpus; choose another --out, or delete it.")
    return store if store.status == "complete" else None
