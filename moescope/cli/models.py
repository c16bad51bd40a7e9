"""Commands about models: which there are, what is in one, and whether it can be captured faithfully."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moescope.cli import screen

if TYPE_CHECKING:
    from moescope.hooks import Anatomy

INSPECT_EXAMPLES = """Examples:

\b
  moescope inspect tiny-qwen-moe
  moescope inspect Qwen/Qwen3-30B-A3B --json
  moescope inspect ./my-checkpoint"""

DOCTOR_EXAMPLES = """Examples:

\b
  moescope doctor tiny-qwen-moe
  moescope doctor ./my-checkpoint --dtype bfloat16
  moescope doctor olmoe --json
  moescope doctor --zoo                              every family that transformers has"""


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """Aliases that begin so, for the shell."""
    from moescope.hooks.aliases import ALIASES

    return [(alias.name, alias.about) for alias in ALIASES.values() if alias.name.startswith(incomplete)]


ModelName = Annotated[
    str, typer.Argument(help="An alias (see `moescope models`), a hub id or a folder.", autocompletion=complete_model)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code from the model's own repository to run.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … (default: a GPU if there is one).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_models(json: Json = False) -> None:
    """List short names of models; hub ids and folders work too."""
    from moescope.hooks.aliases import ALIASES

    if json:
        screen.print_json([{"alias": a.name, "model": a.target, "about": a.about} for a in ALIASES.values()])
        return
    screen.table(("alias", "model", ""), [(a.name, a.target, a.about) for a in ALIASES.values()])


def inspect(model: ModelName, revision: Revision = None, trust_remote_code: Trust = False, json: Json = False) -> None:
    """Say what is in a model, without its weights.

    Layers, experts and parameters, from the configuration alone: seconds for a model of any size.
    """
    screen.quiet_transformers()
    from moescope.hooks import inspect as look

    anatomy = look(model, revision=revision, trust_remote_code=trust_remote_code)
    prices = _prices(anatomy)
    if json:
        sites = [vars(site) for site in anatomy.sites]
        screen.print_json({**vars(anatomy), "sites": sites, "bytes_per_token": prices})
        return
    active = (
        "" if anatomy.n_active_parameters is None else f", {_count(anatomy.n_active_parameters)} active for a token"
    )
    screen.heading(f"{model}: {anatomy.architecture}")
    screen.say(f"{_count(anatomy.n_parameters)} parameters{active}; {screen.size(anatomy.bytes)} in {anatomy.dtype}")
    screen.say(f"{len(anatomy.sites)} of {anatomy.n_layers} layers are Mixture-of-Experts layers")
    screen.table(
        ("layer", "experts", "active", "shared", "router", "experts module"),
        [(s.key, s.n_experts, s.top_k or "?", s.n_shared, s.router, s.experts) for s in anatomy.sites],
        numbers=("experts", "active", "shared"),
    )
    screen.say("on disk, about, with routing weights in float32:")
    screen.table(
        ("tier", "for each token", "for a million tokens"),
        [(tier, screen.size(price), screen.size(price * 1_000_000)) for tier, price in prices.items()],
        numbers=("for each token", "for a million tokens"),
    )


def _prices(anatomy: Anatomy) -> dict[str, int]:
    """Bytes for one token in all layers whose k is declared, by tier."""
    from moescope.capturing.prices import row_bytes

    logit = 4 if anatomy.dtype == "float32" else 2
    layers = [
        row_bytes(site.n_experts, site.top_k, weight_bytes=4, logit_bytes=logit)
        for site in anatomy.sites
        if site.top_k is not None
    ]
    tiers = ("routing", "logits", "experts")
    return {tier: round(sum(layer[tier] for layer in layers)) for tier in tiers}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="An alias, a hub id or a folder; left out with --zoo.", autocompletion=complete_model),
    ] = None,
    zoo: Annotated[
        bool, typer.Option("--zoo", help="Instead: check a tiny model of every family (in a clone of the repository).")
    ] = False,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Prove that a model can be captured faithfully.

    Runs one small batch and prints, for each layer, the routing rule that reproduces its ids and weights, and how
    closely sum(weight x expert output) rebuilds what the experts returned. Logits must stay bit-identical.
    """
    from moescope.errors import MoescopeError

    screen.quiet_transformers()
    if zoo:
        from moescope.cli.zoo import report

        report(json)
        return
    if model is None:
        raise MoescopeError("Name a model (`moescope models` lists some), or ask for --zoo.")
    from moescope.hooks import load

    loaded = load(model, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    rows = [
        {
            "layer": check.site.key,
            "experts": check.site.n_experts,
            "active": check.semantics.top_k,
            "score": check.semantics.score_function,
            "renormalised": check.semantics.renormalised,
            "selection": check.semantics.selection,
            "bias": check.semantics.bias,
            "groups": check.semantics.groups,
            "rebuild error": check.rebuild_error,
            "note": check.note,
        }
        for check in loaded.check.sites
    ]
    if json:
        screen.print_json({"model": model, **loaded.check.as_dict(), "checks": rows})
        return
    blind = [row for row in rows if row["rebuild error"] is None]
    screen.heading(f"{model}: can be captured faithfully{' (routing and logits only)' if blind else ''}")
    outputs = f"expert outputs cannot be observed in {len(blind)} layers" if blind else "every expert output was found"
    screen.say(f"logits with and without capture are bit-identical; {outputs}")
    screen.table(
        ("layer", "experts", "active", "score", "selection", "rebuild error"),
        [(r["layer"], r["experts"], r["active"], _score(r), _selection(r), _error(r["rebuild error"])) for r in rows],
        numbers=("experts", "active", "rebuild error"),
    )
    for words in loaded.execution:
        screen.say(f"this model {words}")
    for path in loaded.check.idle:
        screen.say(f"idle on text, not captured: {path}")
    for note in sorted({str(row["note"]) for row in rows if row["note"]}):
        screen.say(note)


def _score(row: dict) -> str:
    if row["score"] is None:
        return "unproven"
    return f"{row['score']}, renormalised" if row["renormalised"] else str(row["score"])


def _selection(row: dict) -> str:
    if row["selection"] is None:
        return "unproven (margins are null)"
    parts = [f"top-k of the {row['selection']}"]
    if row["bias"]:
        parts.append(f"+ {row['bias']}")
    if row["groups"]:
        n, kept, how = row["groups"]
        parts.append(f"in {kept} of {n} groups by {how}")
    return " ".join(parts)


def _error(value: float | None) -> str:
    return "not observable" if value is None else f"{value:.1e}"


def _count(n: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f}{unit}"
    return str(n)
