"""What a zoo row says: how to build one tiny MoE model, and the arithmetic its routing and experts obey.

Rows are data. The arithmetic they name is carried out by `reference_routing` and `reference_experts`, from raw weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Routing:
    """How a router turns one token into ids and weights.

    Attributes:
        score: function of the logits whose values select and weight. With `over="selected"` the k largest logits select
            and the function is applied to those k alone.
        weight: the linear's weight, relative to the router module.
        logit_bias: that linear's own bias, relative to the router module; part of the logits.
        bias: selection-only bias, relative to the *block*; the weights come from the unbiased scores.
        bias_on: whether the selection bias is added to the score or to the logit.
        groups: how a group's score is made: the sum of its two best, or its best; `group_fill` replaces the selection
            score of experts outside the kept groups. Group counts are config.n_group and config.topk_group; n_group
            None means no groups.
        normalise: divide the k weights by their sum; a string names the config attribute that decides.
        epsilon: added to that sum.
        scale: config attribute whose value multiplies the weights *inside the router*.
        top_k: config attribute that holds k.
        kind: "standard", or the name of a special case in `reference_routing`.
    """

    score: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    over: Literal["all", "selected"] = "all"
    weight: str = "weight"
    logit_bias: str | None = None
    bias: str | None = None
    bias_on: Literal["score", "logit"] = "score"
    groups: Literal["top2", "max"] | None = None
    group_fill: float = float("-inf")
    normalise: bool | str = False
    epsilon: float = 0.0
    scale: str | None = None
    top_k: str = "num_experts_per_tok"
    kind: str = "standard"


@dataclass(frozen=True)
class ExpertMath:
    """What one expert computes from one vector.

    Attributes:
        gate: how the two halves of the up projection combine: "glu" act(gate) * up; "clamped" both clamped first;
            "clamp_after" the activation first; "gpt_oss" (up + 1) * gate * sigmoid(alpha * gate) after clamping;
            "softcapped" tanh caps on the linear gate factor and on up; "none" for experts without a gate.
        activation: "silu", "gelu_tanh", "relu" or "relu2".
        transposed: weights stored [E, in, out] instead of [E, out, in].
        interleaved: gate and up alternate instead of being concatenated.
        biased: both projections have a bias.
        post_norm: RMSNorm on the expert's output, before the routing weight.
        weight_on: the routing weight multiplies the expert's output or (llama4) its input.
        kind: "fused" (3-D parameters), or the name of a special case in `reference_experts`.
    """

    gate: Literal["glu", "clamped", "clamp_after", "gpt_oss", "softcapped", "none"] = "glu"
    activation: Literal["silu", "gelu_tanh", "relu", "relu2"] = "silu"
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    post_norm: bool = False
    weight_on: Literal["output", "input"] = "output"
    kind: str = "fused"


@dataclass(frozen=True)
class Family:
    """One row of the zoo.

    Attributes:
        name: transformers' model type, or "model_type+variant".
        model: the model class built, a name in the transformers namespace.
        config: keyword arguments of its config class; nested dictionaries are sub-configs.
        routing: the router's arithmetic.
        experts: the experts' arithmetic.
        router: the router's attribute name on the block.
        experts_attribute: the experts module's attribute name on the block; "" when the block itself is the experts.
        block: class name of the block, where attribute names alone are not enough to find it.
        dispatched: the experts class goes through transformers' experts registry (@use_experts_implementation).
        encoder_decoder: wants decoder_input_ids.
        canvas: length of those ids where it differs from the encoder's; 0 where it does not.
        token_types: names of extra integer inputs, shaped as input_ids: name -> "zeros" or "random01".
        gains: parameter name suffix -> factor on its random values, where a small model's logits would all but tie.
        notes: what is awkward, with the evidence.
    """

    name: str
    model: str
    config: Mapping[str, Any]
    routing: Routing = field(default_factory=Routing)
    experts: ExpertMath = field(default_factory=ExpertMath)
    router: str = "gate"
    experts_attribute: str = "experts"
    block: str | None = None
    dispatched: bool = True
    encoder_decoder: bool = False
    canvas: int = 0
    token_types: Mapping[str, str] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    notes: str = ""

    @property
    def model_type(self) -> str:
        """The transformers model type, without the variant."""
        return self.name.partition("+")[0]
