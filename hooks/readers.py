"""Which reader reads which kind of site."""

from __future__ import annotations

from moescope.hooks.call_reader import CallReader
from moescope.hooks.exception_readers import PlanReader, ProductKeyReader, ScaledInputReader
from moescope.hooks.facts import Reader
from moescope.hooks.module_reader import ModuleReader

READERS: dict[str, type[Reader]] = {
    "call": CallReader,
    "modules": ModuleReader,
    "scaled input": ScaledInputReader,
    "plan": PlanReader,
    "product keys": ProductKeyReader,
}
