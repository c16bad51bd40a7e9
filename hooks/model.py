"""A model ready to be looked into: the transformers model, its tokenizer, its sites and the self-check's verdict."""

from __future__ import annotations

import hashlib
import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from torch import nn

from moescope.errors import MoescopeError
from moescope.hooks.aliases import ALIASES, BUNDLED
from moescope.hooks.selfcheck import Dtypes, SelfCheck, self_check
from moescope.hooks.semantics import Semantics
from moescope.hooks.sites import Site, discover

CHECK_SHAPE = (4, 64)  # sequences x tokens of the self-check: enough rows to tell routing rules apart, cheap anywhere


class Model:
    """A Mixture-of-Experts language model under observation.

    Attributes:
        hf: the transformers model, in eval mode, never changed by a capture.
        tokenizer: its tokenizer, or None where none was given.
        name: the name it was asked for by.
        revision: commit of its weights on the hub, where known.
        sites: its MoE layers that run on text.
    """

    def __init__(self, hf: Any, tokenizer: Any, name: str, revision: str | None = None) -> None:
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        declared = discover(hf)
        self.check: SelfCheck = self_check(hf, declared, self._check_forward)
        self.sites: list[Site] = [check.site for check in self.check.sites]
        self.semantics: dict[str, Semantics] = {check.site.key: check.semantics for check in self.check.sites}
        self.dtypes: dict[str, Dtypes] = {check.site.key: check.dtypes for check in self.check.sites}

    def __repr__(self) -> str:
        first, semantics = self.sites[0], self.semantics[self.sites[0].key]
        return (
            f"Model({self.name!r}: {len(self.sites)} MoE layers, {first.n_experts} experts, "
            f"{semantics.top_k} active, {self.n_parameters / 1e6:.1f}M parameters)"
        )

    @property
    def device(self) -> torch.device:
        return self.hf.get_input_embeddings().weight.device

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.hf.parameters())

    @property
    def n_active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts it is not sent to."""
        idle = 0
        for site in self.sites:
            experts = sum(p.numel() for p in self.hf.get_submodule(site.experts).parameters())
            idle += experts * (site.n_experts - self.semantics[site.key].top_k) // site.n_experts
        return self.n_parameters - idle

    @property
    def experts_implementation(self) -> str | None:
        """Which of transformers' experts implementations runs."""
        config = getattr(self.hf.get_submodule(self.sites[0].experts), "config", None)
        return getattr(config, "_experts_implementation", None)

    @cached_property
    def config_hash(self) -> str:
        """blake2b-128 of the model's configuration."""
        text = json.dumps(self.hf.config.to_dict(), sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """blake2b-128 of the tokenizer's vocabulary and rules."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def n_layers(self) -> int:
        """Decoder layers, dense ones included, of the stack that holds the first site."""
        stack = self.hf.get_submodule(self.sites[0].layer_path.rpartition(".")[0])
        return len(stack)  # type: ignore[arg-type]

    @property
    def hidden_size(self) -> int:
        return int(self.hf.get_input_embeddings().weight.shape[-1])

    @property
    def max_positions(self) -> int | None:
        """Longest context the configuration declares."""
        config = self.hf.config.get_text_config()
        value = getattr(config, "max_position_embeddings", None)
        return int(value) if isinstance(value, int) and value > 0 else None

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, head: bool = True
    ) -> torch.Tensor:
        """Run the model on token ids [B, S]; logits [B, S, V].

        Without ``head`` the language-model head is computed for one position only, where the model allows it.
        """
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in self._parameters else {}
        if not head and "logits_to_keep" in self._parameters:
            extra["logits_to_keep"] = 1
        output = self.hf(input_ids=input_ids, attention_mask=attention_mask, **extra)
        return output.logits if hasattr(output, "logits") else output[0]

    @cached_property
    def _parameters(self) -> set[str]:
        return set(inspect.signature(self.hf.forward).parameters)

    def _check_forward(self) -> torch.Tensor:
        n_words = self.hf.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        batch, length = CHECK_SHAPE
        shape = (batch, min(length, self.max_positions or length))
        ids = torch.randint(0, n_words, shape, generator=generator).to(self.device)
        with torch.no_grad():
            return self.forward(ids, torch.ones_like(ids)).clone()


def wrap(hf: nn.Module, tokenizer: Any = None, name: str | None = None) -> Model:
    """Look into a transformers model that is already in memory.

    Raises:
        RefusedError: it has no MoE layer, or cannot be read faithfully.
    """
    config = getattr(hf, "config", None)
    return Model(hf, tokenizer, name or getattr(config, "_name_or_path", "") or type(hf).__name__)


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

    source = resolve(name)
    _require_reachable(name, source)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    torch_dtype = _dtype(dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **common)
        loader = _model_class(config, trust_remote_code)
        hf = loader.from_pretrained(source, dtype=torch_dtype, use_safetensors=True, **common)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **common)
    except (OSError, ValueError) as error:
        raise MoescopeError(_why_not_loaded(name, source, error)) from error
    hf.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model(hf, tokenizer, name, getattr(config, "_commit_hash", None))


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
        raise MoescopeError(_why_not_loaded(name, source, OSError("HF_HUB_OFFLINE is set")))
    try:
        urlopen(constants.ENDPOINT, timeout=5).close()
    except HTTPError:
        return  # it answered
    except OSError as error:
        raise MoescopeError(_why_not_loaded(name, source, error)) from error


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    import transformers

    remote = trust_remote_code and getattr(config, "auto_map", None)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if not remote and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    return transformers.AutoModelForCausalLM


def _dtype(name: str) -> Any:
    if name == "auto":
        return "auto"
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise MoescopeError(f"Unknown dtype {name!r}: choose auto, {', '.join(known)}.")
    return known[name]


def _why_not_loaded(name: str, source: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        return f"Cannot load {name}: {reason}"
    if "trust_remote_code" in str(error):
        return f"{name} needs code from its own repository; pass --trust-remote-code if you trust it."
    return (
        f"Cannot reach the weights of {name} ({source}): the hub does not answer and they are not in the local cache. "
        f"Offline, try the bundled model: --model {BUNDLED}."
    )
