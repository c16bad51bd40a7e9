"""Load a model by alias, hub id or folder: safetensors only, no remote code unless asked, one sentence if it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from safetensors import SafetensorError
from torch import nn

from moescope.errors import MoescopeError
from moescope.hooks.aliases import ALIASES, BUNDLED
from moescope.hooks.model import Model
from moescope.hooks.sites import discover


def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model by alias, hub id or local folder, and check that it can be captured faithfully.

    Args:
        name: an alias (`moescope models` lists them), a hub id, or a folder.
        revision: branch, tag or commit on the hub.
        dtype: "auto" (as the checkpoint says), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", …; by default a GPU if there is one.
        trust_remote_code: allow code from the model's own repository to run. Off unless asked for.

    Raises:
        MoescopeError: unknown name, weights that cannot be reached, or a bad option.
        RefusedError: no MoE layer, or one that cannot be read faithfully.
    """
    import transformers

    torch_dtype, place = _dtype(dtype), _device(device)
    config = load_config(name, revision, trust_remote_code)
    source = resolve(name)
    loader = model_class(config, trust_remote_code)
    if not Path(source).is_dir() and not trust_remote_code:
        discover(skeleton(loader, config, name))  # refused before gigabytes are fetched for it
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
        hf, loaded = loader.from_pretrained(
            source, dtype=torch_dtype, use_safetensors=True, output_loading_info=True, **common
        )
        hf.to(place)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise MoescopeError(_why_not_loaded(name, source, error)) from error
    _require_whole(name, loaded)
    return Model(hf, tokenizer, name, getattr(config, "_commit_hash", None))


def skeleton(loader: Any, config: Any, name: str) -> nn.Module:
    """The model on the meta device: every module and shape, no weights.

    Raises:
        MoescopeError: the configuration cannot be built.
    """
    try:
        with torch.device("meta"):
            return loader.from_config(config) if hasattr(loader, "from_config") else loader(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise MoescopeError(f"The configuration of {name} cannot be built: {error}") from error


def _require_whole(name: str, loaded: dict[str, Any]) -> None:
    """Refuse a checkpoint without all its tensors: transformers would fill them with random numbers and go on."""
    for problem, what in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        keys = sorted(map(str, loaded.get(problem) or ()))
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise MoescopeError(f"The checkpoint of {name} {what} {keys[0]}{more}; its numbers would be random.")


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's configuration, or one sentence that says why there is none."""
    import transformers

    source = resolve(name)
    _require_reachable(name, source)
    try:
        return transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise MoescopeError(_why_not_loaded(name, source, error)) from error


def resolve(name: str) -> str:
    """The folder or hub id behind a name.

    Raises:
        MoescopeError: the bundled model is not installed, or the name is neither alias, folder nor hub id.
    """
    if name == BUNDLED:
        from moescope.data import MODEL

        if not (MODEL / "config.json").is_file():
            raise MoescopeError(f"The bundled model is missing from this installation ({MODEL}); reinstall moescope.")
        return str(MODEL)
    if name in ALIASES:
        return ALIASES[name].target
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise MoescopeError(f"{name} is a folder without config.json, so not a Hugging Face checkpoint.")
        return name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MoescopeError(
            f"{name!r} is no alias (`moescope models` lists them), no folder, and no hub id of the form owner/name."
        )
    return name


def _require_reachable(name: str, source: str) -> None:
    """Say at once that the hub cannot be reached; its client would retry for half a minute first."""
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(source).is_dir() or isinstance(try_to_load_from_cache(source, "config.json"), str):
        return
    if constants.HF_HUB_OFFLINE:
        raise MoescopeError(_offline(name, source))
    try:
        urlopen(constants.ENDPOINT, timeout=5).close()
    except HTTPError:
        return  # it answered
    except OSError as error:
        raise MoescopeError(_offline(name, source)) from error


def model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class named in the configuration (it may be multimodal), else the causal language model."""
    import transformers

    remote = trust_remote_code and getattr(config, "auto_map", None)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if not remote and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    return transformers.AutoModelForCausalLM


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MoescopeError(f"There is no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str) -> Any:
    if name == "auto":
        return "auto"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise MoescopeError(f"Unknown dtype {name!r}: choose auto, {', '.join(known)}.")
    return known[name]


def _offline(name: str, source: str) -> str:
    return (
        f"Cannot reach the weights of {name} ({source}): the hub does not answer and they are not in the local cache. "
        f"Offline, try the bundled model: --model {BUNDLED}."
    )


def _why_not_loaded(name: str, source: str, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{name} needs code from its own repository; pass --trust-remote-code if you trust it."
    if not Path(source).is_dir():
        if "gated" in text or "401" in text or "403" in text:
            return f"{source} is gated or private on the hub; log in with `hf auth login` and accept its terms there."
        if "not a valid model identifier" in text or "404" in text:
            return f"There is no model {source} on the hub."
        if "couldn't connect" in text or "offline" in text:
            return _offline(name, source)
    reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return f"Cannot load {name}: {reason}"
