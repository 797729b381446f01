"""Training in several processes: what DDP expects, and parameters that FSDP2 and DeepSpeed ZeRO-3 spread.

The latter leave each process a part of every parameter and put parameters together while a module runs. What a prefix's
file contains is needed at other times, too, and all processes have to take part in putting it together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.integrations import is_fsdp_enabled

from .errors import PrefixInputError, some_of


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds only a part of a parameter."""
    return _is_dtensor(tensor) or hasattr(tensor, "ds_id")


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of some parameters and buffers, put together; all processes must call this where they are spread."""
    with _put_together(tensors):
        return {name: _full(tensor.detach()).clone() for name, tensor in tensors.items()}


def require_whole(module: nn.Module) -> None:
    """Check that a prefix is read where its parameters are put together.

    Raises:
        PrefixInputError: FSDP puts a part of it together at another time.
    """
    if any(_is_dtensor(parameter) for parameter in module.parameters()):
        raise PrefixInputError(
            "This process holds only a part of the prefix here. Run the model that accelerator.prepare returned, and "
            "for its other methods say torch.distributed.fsdp.register_fsdp_forward_method(model, 'generate') first "
            "(the Trainer does). If it is the forward pass that fails, the prefix was wrapped apart from the model: "
            "use fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP."
        )


def require_no_wrapped_layers(stacks: Iterable[nn.ModuleList]) -> None:
    """Check that no layer runs again in the backward pass in a way that cannot be followed.

    Args:
        stacks: Lists of layers.

    Raises:
        PrefixInputError: FSDP's own activation checkpointing would read no prefix then.
    """
    if any("_checkpoint_wrapped_module" in layer._modules for layers in stacks for layer in layers):
        raise PrefixInputError(
            "FSDP's activation checkpointing runs layers again after the call, without the prefix. Set "
            "fsdp_activation_checkpointing: false, and call model.gradient_checkpointing_enable() or use "
            "TrainingArguments(gradient_checkpointing=True), which saves as much memory."
        )


def require_all_used(prefixes: nn.ModuleDict, used: Collection[str], by_row: bool) -> None:
    """Check that DDP and FSDP can average the gradients of a bank of which some prefixes act.

    Args:
        prefixes: All of them.
        used: Names of those that act.
        by_row: Whether others may act in other processes, whose rows name others.

    Raises:
        PrefixInputError: Gradients would be waited for that never come. (In DDP's first step each process would use its
            own gradients alone, and the second would fail.)
    """
    if not distributed.is_available() or not torch.is_grad_enabled():
        return
    from torch.nn.parallel import DistributedDataParallel  # there is no such module without it

    parallel = DistributedDataParallel._get_active_ddp_module()
    waits = parallel is not None and not parallel.find_unused_parameters
    in_shards = by_row and parse_flag_from_env("ACCELERATE_USE_FSDP") and distributed.is_initialized()
    if not waits and not in_shards:
        return
    idle = [
        name
        for name, module in list(prefixes.items())
        if name not in used and any(parameter.requires_grad for parameter in module.parameters())
    ]
    if idle and in_shards:
        raise PrefixInputError(
            "With FSDP every process needs a row of each prefix that is trained in each of its batches; here "
            f"{some_of(map(repr, idle))} have none. Use DDP with ddp_find_unused_parameters=True, or train prefixes "
            "one after the other with set_prefix."
        )
    if idle:
        raise PrefixInputError(
            "DistributedDataParallel waits for gradients of all that is trainable, and the prefixes "
            f"{some_of(map(repr, idle))} get none while {some_of(map(repr, used))} is in use. Freeze what is not "
            f"trained now, e.g. model.prefixes[{idle[0]!r}].requires_grad_(False), or use find_unused_parameters=True "
            "(ddp_find_unused_parameters=True in TrainingArguments, with gradient checkpointing that is not reentrant)."
        )


def complete(base: PreTrainedModel) -> None:
    """Give every process the base's weights where only the main process has read them.

    That is what `cpu_ram_efficient_loading` of FSDP does in `from_pretrained`; but a prefix that is made of the base's
    own keys and values needs the base at once, in every process. All of them must make the model.
    """
    if not is_fsdp_enabled() or not base.config.name_or_path:
        return
    replaced: dict[torch.Tensor, torch.Tensor] = {}
    for module in base.modules():
        for kind in (module._parameters, module._buffers):
            tensors: dict[str, Any] = cast("Any", kind)
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if tensor not in replaced:  # parameters may be shared
                        replaced[tensor] = _room_for(tensor)
                    tensors[name] = replaced[tensor]
    reachable = [backend.split(":")[0] for backend in str(distributed.get_backend_config()).split(",")]
    with torch.no_grad():
        for tensor in [*base.parameters(), *base.buffers()]:
            sent = tensor if tensor.device.type in reachable else tensor.to(reachable[0])
            distributed.broadcast(sent, src=0)
            tensor.copy_(sent)


@contextmanager
def readable(base: nn.Module) -> Iterator[None]:
    """While this is open, a base runs whose parameters DeepSpeed has spread on loading, before it has been prepared.

    Each module's own parameters are put together while it runs; all processes must take part.
    """
    partitioned = {
        module: {name: parameter for name, parameter in module.named_parameters(recurse=False) if is_sharded(parameter)}
        for module in base.modules()
        if type(module._parameters) is dict  # DeepSpeed's engine has exchanged it, and looks after itself
    }
    running: dict[nn.Module, ExitStack] = {}

    def before(module: nn.Module, args: Any) -> None:
        if module not in running:
            running[module] = ExitStack()
            running[module].enter_context(_put_together(partitioned[module]))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if module in running:
            running.pop(module).close()

    handles = []
    for module in [module for module, parameters in partitioned.items() if parameters]:
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stack in running.values():  # passes that failed
            stack.close()


def _room_for(tensor: torch.Tensor) -> torch.Tensor:
    room = torch.empty_like(tensor, device="cpu")
    return nn.Parameter(room, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else room


def _put_together(tensors: Mapping[str, torch.Tensor]) -> AbstractContextManager[Any]:
    partitioned = [tensor for tensor in tensors.values() if hasattr(tensor, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed  # who has such parameters has it

    return cast("AbstractContextManager[Any]", deepspeed.zero.GatheredParameters(partitioned))


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return cast("Any", tensor).full_tensor() if _is_dtensor(tensor) else tensor


def _is_dtensor(tensor: torch.Tensor) -> bool:
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # there is no such module without it

    return isinstance(tensor, DTensor)


def own_class(base: PreTrainedModel) -> type[PreTrainedModel]:
    """The class that a model had before FSDP2 put one of its own in front."""
    return next(one for one in type(base).mro() if issubclass(one, PreTrainedModel) and not issubclass(one, FSDPModule))
