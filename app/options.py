"""The parameters of one analysis as the URL carries them, and the command and the Python line that ask the same.

alternative:two-sided;layers:3,4;draws:100
"""

from __future__ import annotations

import re
import shlex
from typing import Any
from urllib.parse import unquote

from moescope.analysis.question import Analysis, Parameter
from moescope.app.scene import Scene
from moescope.errors import MoescopeError

ROWS = "rows"
"""Beside the parameters: the dimensions that make a row of the table, as `--rows` takes them."""
MOST = 1_000_000
"""Of a parameter that is a whole number: an address of a few characters could ask for more than memory holds."""

_COLUMN = re.compile(r"document label|label of the documents")
_FIRST = re.compile(r"default: (the )?(store's )?first\b")


def raw(options: str | None) -> dict[str, str]:
    """Each option's text, still unread."""
    found = {}
    for part in (options or "").split(";"):
        name, colon, text = part.partition(":")
        if colon:
            found[name] = text
    return found


def with_option(options: str | None, name: str, text: str | None) -> str | None:
    """The options with one of them changed; without text it takes its default again."""
    kept = raw(options)
    kept.pop(name, None)
    if text:
        kept[name] = ",".join(_hidden(part) for part in text.split(","))
    return ";".join(f"{key}:{value}" for key, value in kept.items()) or None


def shown(options: str | None, name: str) -> str:
    """An option as a person writes it; "" if it has its default."""
    return ",".join(unquote(part) for part in raw(options).get(name, "").split(","))


def read(question: Analysis, options: str | None) -> dict[str, Any]:
    """The options as keywords of the analysis.

    Raises:
        MoescopeError: one of them is not a parameter of it, or cannot be what it says.
    """
    known = {parameter.name: parameter for parameter in question.parameters}
    found = {}
    for name, text in raw(options).items():
        if name == ROWS:
            continue
        if name not in known:
            raise MoescopeError(f"{question.name} has no parameter {name!r}; it has {', '.join(known)}.")
        parts = [unquote(part).strip() for part in text.split(",")]
        parameter = known[name]
        if parameter.many:
            found[name] = [_value(parameter, part) for part in parts if part]
        else:
            found[name] = _value(parameter, ",".join(parts))
    return found


def parameters(scene: Scene, question: Analysis) -> dict[str, Any]:
    """All keywords of the question as it stands: the options, and what the selection above says where it applies.

    The label column follows the selection where the analysis would take the store's first if none were named; where
    none means "all documents together" it stays an option.

    Raises:
        MoescopeError: an option cannot be read, or the selection names what the store does not have.
    """
    found = read(question, scene.place.options)
    for name in followed(question):
        if name not in found and (value := _selected(scene, question, name)) is not None:
            found[name] = value
    return found


def followed(question: Analysis) -> list[str]:
    """The parameters that follow the selection above the page."""
    names = [p.name for p in question.parameters if p.name == "phase" or follows_label(p)]
    return names + (["where"] if question.filters else [])


def names_column(parameter: Parameter) -> bool:
    """It takes the name of a document label."""
    return parameter.type is str and not parameter.choices and bool(_COLUMN.search(parameter.help))


def follows_label(parameter: Parameter) -> bool:
    """It takes the name of a document label, and the store's first one if none is given."""
    return names_column(parameter) and bool(_FIRST.search(parameter.help))


def command(question: Analysis, stores: list[str], given: dict[str, Any], rows: str = "") -> str | None:
    """The command line that asks the same, run in the folder of the stores; None where it cannot say it.

    Args:
        question: the analysis.
        stores: what it takes by position: paths below the folder, or a placeholder.
        given: keywords, as `parameters` gives them.
        rows: the dimensions that make a row of its table, if not its own.
    """
    known = {parameter.name: parameter for parameter in question.parameters}
    words = ["moescope", "analyze", question.name, *stores]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "where":
            if "document" in value:
                return None
            words += [w for column, values in value.items() for one in values for w in (flag, f"{column}={one}")]
        elif known[name].type is bool:
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            for one in value if known[name].many else [value]:
                text = f"{one:g}" if isinstance(one, float) and float(f"{one:g}") == one else str(one)
                words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    if rows:
        words += ["--rows", rows]
    return " ".join(shlex.quote(word) for word in words)


def python(question: Analysis, stores: list[str], given: dict[str, Any]) -> str:
    """The Python line that asks the same."""
    opened = ", ".join(f"ms.open({name!r})" for name in stores)
    keywords = "".join(f", {name}={value!r}" for name, value in given.items())
    return f"ms.analysis.{question.run.__name__}({opened}{keywords})"


def unasked(scene: Scene, question: Analysis) -> str | None:
    """Why this page cannot ask the question of this store; None if it can."""
    if "weights" in question.inputs:
        return "It reads the model's weights, which a store does not keep."
    if "other" in question.inputs:
        return "It needs a second store of the same tokens."
    if "stores" in question.inputs:
        return "It needs a series of stores of the same tokens, one for each checkpoint."
    if question.tier not in ("none", *scene.store.tiers):
        return f"This store has no {question.tier} tier; capture again with --tiers routing,{question.tier}."
    return None


def _selected(scene: Scene, question: Analysis, name: str) -> Any:
    if name == "phase":
        return scene.place.phase
    if name == "where":
        return scene.where
    return scene.by


def _value(parameter: Parameter, text: str) -> Any:
    if parameter.choices:
        if text not in parameter.choices:
            raise MoescopeError(f"{parameter.name} is one of {', '.join(parameter.choices)}, not {text!r}.")
        return text
    if parameter.type is bool:
        if text not in ("yes", "no"):
            raise MoescopeError(f"{parameter.name} is yes or no, not {text!r}.")
        return text == "yes"
    if parameter.type is int:
        if not re.fullmatch(r"-?\d{1,15}", text, re.ASCII):
            raise MoescopeError(f"{parameter.name} is a whole number, not {text!r}.")
        if parameter.name != "seed" and abs(int(text)) > MOST:
            raise MoescopeError(f"{parameter.name} is at most {MOST:,} here; `moescope analyze` takes more.")
        return int(text)
    if parameter.type is float:
        if not re.fullmatch(r"-?(\d{1,15}(\.\d{0,17})?|\.\d{1,17})(e[-+]?\d{1,3})?", text, re.ASCII):
            raise MoescopeError(f"{parameter.name} is a number, not {text!r}.")
        return float(text)
    return text


def _hidden(text: str) -> str:
    return text.replace("%", "%25").replace(";", "%3B")
