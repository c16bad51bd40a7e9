"""The `moescope` command with its exit code and words: in this process, or in one of its own where that is the point.

Importing torch and transformers takes some four seconds of each process, more than most commands do.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

from moescope.cli import main

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"}


def moescope(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the entry point here, with the arguments, exit code and outputs of a process."""
    words = ["moescope", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    columns = mock.patch.dict(os.environ, {"COLUMNS": ENVIRONMENT["COLUMNS"]})
    offline = mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment at its import
    said = mock.patch.object(sys, "argv", words)
    with columns, offline, said, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    assert code is None or isinstance(code, int)
    return subprocess.CompletedProcess(words, code or 0, out.getvalue(), err.getvalue())


def in_a_process(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-m", "moescope.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False)
