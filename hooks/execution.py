"""How a model runs, where that is out of the ordinary: quantised, compiled, in fused kernels, spread over devices.

Such a model is captured when the self-check passes, and what is unusual is written down; where it fails, the refusal
says by name what is probably in the way. What the check could not prove at all is refused before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from moescope.errors import RefusedError

T = TypeVar("T")
FUSED_BLOCKS = {  # by class name: what runs as one kernel, and how to load the model so that it does not
    "Mxfp4GptOssMLP": "runs router and experts in one MXFP4 kernel; load it with Mxfp4Config(dequantize=True)",
}


def unusual(hf: nn.Module) -> list[str]:
    """What is out of the ordinary about how a model runs, in words; mostly nothing."""
    found = []
    method = _quantisation(hf)
    if method is not None:
        found.append(f"is quantised ({method})")
    names = {type(module).__name__ for module in hf.modules()}
    found += [words for name, words in FUSED_BLOCKS.items() if name in names]
    if is_compiled(hf):
        found.append("is compiled by torch.compile; pass the model from before")
    if getattr(hf, "_use_kernels", False):
        found.append("runs kernels from the hub; load it with use_kernels=False")
    return found


def refuse_spread(hf: nn.Module) -> None:
    """Raises RefusedError where a model's parts live in several places, so that no single reading shows all of it."""
    if isinstance(hf, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel):
        raise RefusedError("This is a data-parallel wrapper; pass the model inside it (.module).")
    for path, module in hf.named_modules():
        if getattr(module, "_is_expert_parallel", False) is True:
            raise RefusedError(
                f"{path} is expert parallel: this process sees only its own experts, and other ids are placeholders. "
                "Load the model without a tensor-parallel plan (tp_plan=None)."
            )
    parameters = dict(hf.named_parameters())
    sharded = next((name for name, parameter in parameters.items() if hasattr(parameter, "device_mesh")), None)
    if sharded is not None:
        raise RefusedError(f"{sharded} is sharded over several processes; load the model without tp_plan or FSDP.")
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if "meta" in devices:
        raise RefusedError("Some weights of this model are offloaded; load it whole on one device (--device).")
    if len(devices) > 1:
        raise RefusedError(f"This model is spread over {', '.join(devices)}; load it whole on one of them (--device).")


def is_compiled(hf: nn.Module) -> bool:
    """Whether the model or a part of it goes through torch.compile."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in hf.modules()) or (
        type(hf).__name__ == "OptimizedModule"
    )


def checked(hf: nn.Module, words: list[str], check: Callable[[], T]) -> T:
    """Run a self-check; a refusal carries what is unusual about the model, and a compiler's complaint becomes one."""
    try:
        return check()
    except RefusedError as refusal:
        raise RefusedError(f"{refusal} This model {'; it '.join(words)}." if words else str(refusal)) from refusal
    except _compiler_errors(hf) as error:
        first = str(error).strip().splitlines()[0]
        raise RefusedError(f"A compiled model cannot be watched ({first}); pass the model from before.") from error


def _compiler_errors(hf: nn.Module) -> tuple[type[BaseException], ...]:
    if not is_compiled(hf):
        return ()
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def _quantisation(hf: Any) -> str | None:
    config = getattr(getattr(hf, "config", None), "quantization_config", None)
    if config is not None:
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        return str(getattr(method, "value", method))
    narrow = {str(parameter.dtype) for parameter in hf.parameters() if _is_packed(parameter.dtype)}
    return None if not narrow else ", ".join(sorted(narrow)).replace("torch.", "")


def _is_packed(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point or dtype.itemsize == 1
