"""`moescope analyze NAME STORE …`: one command for each registered analysis, made from its own list of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moescope.analysis import ANALYSES, table
from moescope.analysis.spreadsheets import write_csv
from moescope.cli import screen
from moescope.errors import MoescopeError
from moescope.store import Store

if TYPE_CHECKING:
    import xarray as xr

    from moescope.analysis import Analysis, Parameter

OUTPUTS = {
    "rows": (str, None, "Dimensions that make a row, e.g. layer or layer,expert (default: what the analysis names)."),
    "json": (bool, False, "Print JSON: the attributes and one object a row."),
    "csv": (Path, None, "Write the table to this CSV file."),
    "html": (Path, None, "Write the figure to this HTML file; it works offline."),
}
ROWS_SHOWN = 30  # on a terminal; --csv and --json give all


def run(name: str | None, arguments: list[str], general_help: Callable[[], str]) -> None:
    """Run the named analysis with the rest of the command line, or list the analyses."""
    if name in (None, "-h", "--help"):
        screen.say(general_help())
        screen.table(("analysis", "the question it answers"), [(a.name, a.help) for a in ANALYSES.values()])
        return
    name = str(name).replace("-", "_")
    if name not in ANALYSES:
        raise MoescopeError(f"There is no analysis {name!r}. There are: {', '.join(ANALYSES)}.")
    app = typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(help=_help(ANALYSES[name]))(_command(ANALYSES[name]))
    app(arguments, prog_name=f"moescope analyze {name}")


def _command(analysis: Analysis) -> Callable[..., None]:
    """A function with the analysis's parameters in its signature, which is what typer reads."""

    def command(**options: Any) -> None:
        model = options.get("weights")
        inputs = [_INPUTS[name].read(options.pop(name)) for name in analysis.inputs]
        outputs = {key: options.pop(key) for key in OUTPUTS}
        for file in (outputs["csv"], outputs["html"]):
            if file is not None and not file.absolute().parent.is_dir():
                raise MoescopeError(f"There is no folder {file.parent} to write {file.name} into.")
        given = {key: value for key, value in options.items() if value is not None and value != []}
        if "where" in given:
            given["where"] = _filters(given["where"])
        with screen.watching():
            result = analysis.run(*inputs, **given)
        if model is not None:
            result.attrs["model"] = model
        _show(result, **outputs)

    signature = [_argument(name) for name in analysis.inputs]
    signature += [_option(p.name, _type(p), p.default, _sentence(p)) for p in analysis.parameters]
    if analysis.filters:
        signature.append(_option("where", list[str], None, "Only documents with label=value; repeat for several."))
    signature += [_option(key, *rest) for key, rest in OUTPUTS.items()]
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature}
    return command


def _filters(asked: list[str]) -> dict[str, list[str]]:
    """Labels and the values to keep of each: values of one label are alternatives, labels must all hold."""
    found: dict[str, list[str]] = {}
    for pair in asked:
        label, equals, value = pair.partition("=")
        if not label or not equals:
            raise MoescopeError(f"--where takes label=value, for instance domain=code, not {pair!r}.")
        found.setdefault(label, []).append(value)
    return found


@dataclass(frozen=True)
class _Input:
    """How a face gives an analysis what it takes by position: the argument's type, its help, and who reads it."""

    type: Any
    help: str
    read: Callable[[Any], Any]


def _weights(model: str) -> Iterator[tuple[int, Any]]:
    """Each layer's expert weights, one layer in memory at a time."""
    from moescope.hooks import load
    from moescope.hooks.weights import expert_weights

    screen.quiet_transformers()
    loaded = load(model)
    for site in loaded.sites:
        yield site.layer, expert_weights(loaded, site.key)


_INPUTS = {
    "store": _Input(Path, "Folder of a store.", Store.open),
    "other": _Input(Path, "Folder of a second store of the same tokens.", Store.open),
    "stores": _Input(
        list[Path], "Folders of stores of the same tokens, in order.", lambda all: [*map(Store.open, all)]
    ),
    "weights": _Input(str, "Model whose weights are read: a short name, hub id or folder.", _weights),
}


def _argument(name: str) -> inspect.Parameter:
    given = _INPUTS[name]
    shown = "MODEL" if name == "weights" else name.upper()
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[given.type, typer.Argument(help=given.help, metavar=shown)],
    )


def _option(name: str, kind: Any, default: Any, text: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    if kind is bool and default:
        flag = f"{flag}/--no-{flag[2:]}"  # what is on by itself needs a way to be off
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind if default is not None else kind | None, typer.Option(flag, help=text)],
    )


def _type(parameter: Parameter) -> Any:
    if parameter.choices:
        return Literal[parameter.choices]
    return list[parameter.type] if parameter.many else parameter.type


def _sentence(parameter: Parameter) -> str:
    return parameter.help[0].upper() + parameter.help[1:] + "."


def _help(analysis: Analysis) -> str:
    """The question, and the docstring's own words on how to read the answer."""
    return analysis.help + (f"\n\nHow to read it: {analysis.reading}" if analysis.reading else "")


def _show(result: xr.Dataset, rows: str | None, json: bool, csv: Path | None, html: Path | None) -> None:
    dims = None if rows is None else [name.strip() for name in rows.split(",")]
    found = table(result, dims)
    if csv is not None:
        write_csv(found, csv)
    if html is not None:
        from moescope.figures import draw, save

        save(draw(result), html)
    plain = found.astype(object).where(found.notna(), None)
    if json:
        screen.print_json({"attrs": result.attrs, "rows": plain.to_dict("records")})
        return
    for path in (csv, html):
        if path is not None:
            screen.say(f"{path} is written")
    if csv is None and html is None:
        numbers = [str(c) for c in found.columns if found[c].dtype.kind in "if"]
        shown = plain.head(ROWS_SHOWN)
        cells = [[screen.cell(value) for value in row] for row in shown.to_numpy()]
        screen.table([str(c) for c in found.columns], cells, numbers)
        if len(found) > len(shown):
            screen.say(f"{len(shown)} of {len(found)} rows; --csv FILE or --json gives all")
