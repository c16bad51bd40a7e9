"""A model ready to be looked into: the transformers model, its tokenizer, its sites and the self-check's verdict."""

from __future__ import annotations

import hashlib
import inspect
import json
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from moescope.hooks.execution import checked, refuse_spread, unusual
from moescope.hooks.selfcheck import Dtypes, SelfCheck, self_check
from moescope.hooks.semantics import Semantics
from moescope.hooks.sites import Site, active_parameters, discover, plain_path

if TYPE_CHECKING:
    from moescope.hooks.interventions import Acts, Live

CHECK_SHAPE = (4, 64)  # sequences x tokens of the self-check: enough rows to tell routing rules apart, cheap anywhere

PLACE = ("_name_or_path", "transformers_version")  # of a configuration: where and with what it was read, not what it is
FINGERPRINT_VALUES = 4096  # of each tensor: several in each expert


class Editing(Protocol):
    """What can say which acts it is at each site of a model: a recipe."""

    def acts(self, model: Any, /) -> Acts:
        """Site key -> acts."""
        ...


class Model:
    """A Mixture-of-Experts language model under observation.

    Attributes:
        hf: the transformers model, in eval mode, never changed by a capture.
        tokenizer: its tokenizer, or None where none was given.
        name: the name it was asked for by.
        revision: commit of its weights on the hub, where known.
        sites: its MoE layers that run on text.
        execution: what is out of the ordinary about how it runs, in words.
        edits: what is edited now, inside `edited`, in words; a capture writes it down.
    """

    def __init__(self, hf: Any, tokenizer: Any, name: str, revision: str | None = None) -> None:
        self.hf = hf.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.edits: list[str] = []
        refuse_spread(hf)
        self.execution = unusual(hf)
        declared = discover(hf)
        batch = self.check_batch()
        self.check: SelfCheck = checked(
            hf,
            self.execution,
            lambda: self_check(hf, declared, lambda: self._check_forward(batch), batch.numel()),
        )
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
        """Parameters that one token meets."""
        return active_parameters(self.hf, self.sites, {key: found.top_k for key, found in self.semantics.items()})

    @property
    def experts_implementation(self) -> str | None:
        """Which of transformers' experts implementations runs."""
        config = getattr(self.hf.get_submodule(self.sites[0].experts), "config", None)
        return getattr(config, "_experts_implementation", None)

    @cached_property
    def config_hash(self) -> str:
        """blake2b-128 of the model's configuration, wherever its folder lies and whichever transformers read it."""
        return _hash(_without(self.hf.config.to_dict(), PLACE))

    def config_hash_in(self, dtype: str) -> str:
        """`config_hash` of the same model loaded in another precision ("bfloat16"): the configuration holds it too."""
        return _hash(_in(_without(self.hf.config.to_dict(), PLACE), dtype))

    @cached_property
    def weights_fingerprint(self) -> str:
        """blake2b-128 over evenly spaced values of every parameter: tells another training or an edit, reads little."""
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in self.hf.named_parameters():
            values = parameter.detach().flatten()
            some = values[:: max(1, len(values) // FINGERPRINT_VALUES)].float().cpu()
            digest.update(f"{plain_path(name)} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(some.numpy().tobytes())
        return digest.hexdigest()

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

    @property
    def has_encoder(self) -> bool:
        """Whether a decoder beside an encoder writes: prompt and answer are then no one sequence."""
        return bool(self.hf.config.is_encoder_decoder) or "decoder_input_ids" in self.forward_arguments

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, head: bool = True
    ) -> torch.Tensor:
        """Run the model on token ids [B, S]; logits [B, S, V].

        Without ``head`` the language-model head is computed for one position only, where the model allows it. A model
        with a decoder beside its encoder gets the text in both, so that row t of either is token t.
        """
        extra: dict[str, Any] = {"use_cache": False} if "use_cache" in self.forward_arguments else {}
        if "decoder_input_ids" in self.forward_arguments:
            extra["decoder_input_ids"] = input_ids
            if self.forward_arguments & {"decoder_attention_mask", "decoder_position_ids"} == {
                "decoder_attention_mask"
            }:
                extra["decoder_attention_mask"] = attention_mask  # that of a canvas has another shape: see `own_batch`
        if not head and "logits_to_keep" in self.forward_arguments:
            extra["logits_to_keep"] = 1
        return self.run({"input_ids": input_ids, "attention_mask": attention_mask, **extra})

    def run(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits [B, S, V] of one forward pass with these arguments."""
        output = self.hf(**inputs)
        return output.logits if hasattr(output, "logits") else output[0]

    def edited(self, recipe: Editing, *, check: bool = True) -> Live:
        """``with model.edited(recipe):`` runs the model with a recipe's edits; afterwards it is as before, to the bit.

        Args:
            recipe: a `moescope.Recipe`.
            check: run one small batch on entering, to see that the edits do what they say.

        Raises:
            MoescopeError: an unknown layer or expert, or edits that contradict each other.
            RefusedError: this family's blocks cannot be edited so.
        """
        from moescope.hooks.interventions import Live

        return Live(self, recipe.acts(self), check=check)

    @property
    def pad_id(self) -> int:
        """What fills up shorter texts: any id will do, since pads are masked and never stored."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if pad is not None else 0

    @cached_property
    def own_batch(self) -> str | None:
        """Why a text must be run in a batch of its own for its routing to be its own; None where it need not be."""
        routers = [self.hf.get_submodule(site.router) for site in self.sites]
        if any(site.reader == "product keys" for site in self.sites):
            return "its router mixes the tokens of a batch"
        if any(hasattr(router, "moe_eval_capacity_token_fraction") for router in routers):
            return "its experts' capacity is counted over the batch"
        if "decoder_position_ids" in self.forward_arguments:
            return "its canvas sees the padding of its text"
        return None

    @cached_property
    def forward_arguments(self) -> set[str]:
        """Names of the arguments of its forward."""
        return set(inspect.signature(self.hf.forward).parameters)

    def check_batch(self) -> torch.Tensor:
        """The self-check's token ids: any tokens do, as long as they are the same every time."""
        n_words = self.hf.get_input_embeddings().weight.shape[0]
        batch, length = CHECK_SHAPE
        shape = (batch, min(length, self.max_positions or length))
        return torch.randint(0, n_words, shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def _check_forward(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.forward(ids, torch.ones_like(ids)).clone()


def _hash(config: Any) -> str:
    return hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _in(values: Any, dtype: str) -> Any:
    """A nested configuration with every precision that it names replaced."""
    if not isinstance(values, dict):
        return values
    return {name: dtype if name == "dtype" and inner else _in(inner, dtype) for name, inner in values.items()}


def _without(values: Any, names: tuple[str, ...]) -> Any:
    """A nested dictionary without the entries of these names."""
    if not isinstance(values, dict):
        return values
    return {name: _without(inner, names) for name, inner in values.items() if name not in names}


def wrap(hf: nn.Module, tokenizer: Any = None, name: str | None = None) -> Model:
    """Look into a transformers model that is already in memory.

    Raises:
        RefusedError: it has no MoE layer, or cannot be read faithfully.
    """
    config = getattr(hf, "config", None)
    return Model(hf, tokenizer, name or getattr(config, "_name_or_path", "") or type(hf).__name__)
