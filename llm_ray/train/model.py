"""The model in training: with adapters or fully trained, distributed over the workers by DDP or FSDP."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_ray.conf.finetune import FinetuneConf, Lora
from llm_ray.errors import ConfError
from llm_ray.models.load import Base, has_experts, load_empty_model, load_model
from llm_ray.nearest import nearest_names
from llm_ray.train.adapters import set_magnitudes, speed_up_adapters
from llm_ray.train.attention import switch_to_packed
from llm_ray.train.loss import SupervisedLoss
from llm_ray.train.objectives import objective_of

_ALL = "all-linear"
_NAME = re.compile(r"[\w.-]+")  # a layer's name, as opposed to a pattern
_ROUTERS = {"gate", "router", "shared_expert_gate"}


def load(conf: FinetuneConf, base: Base, dtype: torch.dtype, rank: int) -> PreTrainedModel:
    """Loads the base model. With fsdp, ranks other than 0 have no weights yet: `distribute` gives them their shards.
    Raises ModelError."""
    weightless = conf.training.strategy == "fsdp" and rank != 0
    if weightless:
        causal = load_empty_model(base, dtype)
    else:
        causal = load_model(base, dtype, conf.model.weights, conf.tuning.lora.modules_to_save)
    causal.config.use_cache = False
    return causal


def adapt(conf: FinetuneConf, causal: PreTrainedModel, dtype: torch.dtype, packed: bool) -> SupervisedLoss:
    """Returns the loaded model with its trainable weights and its loss. Raises ConfError."""
    if packed:
        switch_to_packed(causal)
    if conf.training.gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(conf.training.seed)  # the same adapters on every worker
    model: nn.Module = causal
    if conf.tuning.method == "lora":
        model = add_adapters(causal, conf.tuning.lora)
        speed_up_adapters(model)
    if conf.training.accelerator == "ipex":
        _optimize_with_ipex(model, dtype)
    return SupervisedLoss(model, causal, packed, objective_of(conf))


def add_adapters(causal: PreTrainedModel, lora: Lora) -> nn.Module:
    """Wraps `causal` in a peft model with fresh LoRA adapters. Raises ConfError if `tuning.lora` does not fit the model.

    `all-linear` skips the routers of a mixture of experts, and includes its experts, although these are not linear
    layers.
    """
    targets: str | list[str] = list(lora.target_modules)
    if isinstance(lora.target_modules, str):  # peft would treat a name as a pattern, which matches nothing
        targets = (
            lora.target_modules
            if lora.target_modules == _ALL or not _NAME.fullmatch(lora.target_modules)
            else [lora.target_modules]
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.scale,
        lora_dropout=lora.dropped,
        target_modules=targets,
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alphas),
    )
    try:
        # For experts: converts names of layers to names of parameters.
        convert_peft_config_for_transformers(config, causal, None)
        if targets == _ALL:
            config.target_parameters = {
                name for name in config.target_parameters or () if name.split(".")[0] not in _ROUTERS
            }
            if has_experts(causal.config):
                config.exclude_modules = (
                    sorted(_ROUTERS & {name.rpartition(".")[2] for name in _linear(causal)}) or None
                )
        _check_names(causal, lora, config)
        model = get_peft_model(causal, config)
    except (ValueError, re.error) as error:
        raise ConfError(
            f"tuning.lora.target_modules: {lora.target_modules!r} does not match this model{_layers(causal)}. peft "
            f"reports: {error}"
        ) from error
    _check_patterns(model, lora)
    set_magnitudes(model)
    return model


def _check_names(causal: PreTrainedModel, lora: Lora, config: LoraConfig) -> None:
    """Raises ConfError for names that match no layer of the model, which peft ignores, and for DoRA or dropout on
    experts."""
    modules = [name for name, module in causal.named_modules() if not isinstance(module, nn.ModuleList)]
    names = [*modules, *(name for name, _ in causal.named_parameters())]
    asked = {"target_modules": config.target_modules, "modules_to_save": lora.modules_to_save}
    for key, called in asked.items():
        for target in () if isinstance(called, str) else sorted(called):
            if not any(f".{name}".endswith(f".{target}") for name in names):
                near = nearest_names(target, {name.rpartition(".")[2] for name in modules})
                hint = f": do you mean {near[0]}?" if near else _layers(causal)
                raise ConfError(f"tuning.lora.{key}: {target!r} is not a layer of this model{hint}")
    pattern = config.target_modules
    if isinstance(pattern, str) and pattern != _ALL and not any(re.fullmatch(pattern, name) for name in modules):
        raise ConfError(
            f"tuning.lora.target_modules: the pattern {pattern!r} matches no layer's full name, such as "
            f"{_linear(causal)[0]}{_layers(causal)}"
        )
    if lora.dora and config.target_parameters:
        raise ConfError(
            f"tuning.lora.dora: peft has no DoRA for adapters on experts ({', '.join(sorted(config.target_parameters))}): "
            "remove dora, or choose layers outside the experts, such as tuning.lora.target_modules: [q_proj, k_proj, "
            "v_proj, o_proj]"
        )
    if lora.dropped and config.target_parameters:
        raise ConfError(
            f"tuning.lora.dropout is {lora.dropped:g}, but peft has no dropout for adapters on experts "
            f"({', '.join(sorted(config.target_parameters))}): set it to 0, or choose layers outside the experts, "
            "such as tuning.lora.target_modules: [q_proj, k_proj, v_proj, o_proj]"
        )


def _check_patterns(model: nn.Module, lora: Lora) -> None:
    """Raises ConfError for patterns that match no layer with an adapter, which peft ignores."""
    adapted = [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):  # as peft matches them
                kinds = sorted({name.rpartition(".")[2] for name in adapted})
                near = nearest_names(pattern, kinds)
                hint = f": do you mean {near[0]}?" if near else f"; these have one: {', '.join(kinds)}"
                raise ConfError(f"tuning.lora.{key}: no layer with an adapter matches {pattern!r}{hint}")


def _linear(causal: PreTrainedModel) -> list[str]:
    return [name for name, module in causal.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _layers(causal: PreTrainedModel) -> str:
    return f"; its linear layers are {', '.join(sorted({name.rpartition('.')[2] for name in _linear(causal)}))} (or use {_ALL})"


def learning_modules(model: nn.Module) -> list[str]:
    """Describes what is trained, for the user: a line per kind of layer (same name except for numbers), and one for the
    frozen ones.

    Experts whose gate and up projections are one matrix have twice the rank there, since peft gives `tuning.lora.r` to
    each of the two.
    """
    kinds: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    frozen: dict[str, None] = {}
    for name, module in model.named_modules():
        kind = re.sub(
            r"\b\d+\b",
            "*",
            re.sub(r"(^|\.)(base_model\.model|base_layer|original_module)(?=\.|$)", "", name).removeprefix("."),
        )
        if isinstance(module, LoraLayer):
            own = [part for part in module.adapter_layer_names for part in getattr(module, part).parameters()]
            kind += f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
            kinds[kind, f"rank {module.r[module.active_adapters[0]]}"].append(sum(part.numel() for part in own))
        elif isinstance(module, ModulesToSaveWrapper):
            kinds[kind, "trained whole"].append(sum(part.numel() for part in module.parameters() if part.requires_grad))
        elif (
            any(part.dim() > 1 and not part.requires_grad for part in module.parameters(recurse=False))
            and "lora_" not in name
        ):
            frozen[kind] = None
    adapted = [kind for kind, _ in kinds]
    if not kinds:
        return ["all weights are trained"]
    lines = [f"{kind}: {how}, {len(sizes)} of them, {sum(sizes):,} parameters" for (kind, how), sizes in kinds.items()]
    unadapted = [kind for kind in frozen if not any(f"{other}.".startswith(f"{kind}.") for other in adapted)]
    return [*lines, *([f"frozen: {', '.join(unadapted)}"] if unadapted else [])]


def compile_layers(causal: PreTrainedModel) -> None:
    """Compiles each block of the model by torch.compile: blocks share one compilation, and the number of tokens may vary
    from step to step."""
    blocks = set(causal._no_split_modules or ())
    for module in causal.modules():
        if type(module).__name__ in blocks:
            module.compile(dynamic=True)


def distribute(loss: SupervisedLoss, conf: FinetuneConf, world_size: int) -> nn.Module:
    """Distributes the model over the workers by `training.strategy`. Returns the module to call."""
    if world_size == 1:
        return loss
    if conf.training.strategy == "ddp":
        return DistributedDataParallel(loss, gradient_as_bucket_view=True)
    return _shard(loss, world_size)


def _shard(loss: SupervisedLoss, world_size: int) -> nn.Module:
    rank = dist.get_rank()
    whole = {name: tensor.detach() for name, tensor in loss.state_dict().items()} if rank == 0 else {}
    mesh = init_device_mesh("cpu", (world_size,))
    layers = set(loss.causal._no_split_modules or ())
    for module in list(loss.causal.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(loss, mesh=mesh)
    if rank != 0:
        loss.to_empty(device="cpu")
    set_model_state_dict(
        loss, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )
    for _, buffer in sorted(loss.named_buffers()):  # some, like rotary frequencies, are not in the state dict
        dist.broadcast(buffer, 0)
    return loss


@contextlib.contextmanager
def gradient_sync(module: nn.Module, last: bool) -> Iterator[None]:
    """Makes workers exchange gradients only in the `last` backward pass of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


def _optimize_with_ipex(model: nn.Module, dtype: torch.dtype) -> None:
    """Converts the frozen matrices under the adapters to the layout of IPEX's kernels. Raises ConfError if IPEX is not
    installed.

    Trainable weights stay torch's, so that checkpoints and exports are those of accelerator torch.
    """
    try:
        import intel_extension_for_pytorch as ipex
    except ImportError as error:
        raise ConfError(
            "training.accelerator is ipex, but intel-extension-for-pytorch is not installed here: use the IPEX profile "
            "(docs/reference/profiles.md), or accelerator torch"
        ) from error
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and type(layer.base_layer) is nn.Linear:
            # ipex.optimize replaces a module's children, hence the Sequential. In training mode it would require and
            # modify the optimizer, hence eval. Folding batch norms into convolutions, of which there are none, would
            # change the module's type.
            frozen = nn.Sequential(layer.base_layer).eval()
            options = {"conv_bn_folding": False, "linear_bn_folding": False, "auto_kernel_selection": True}
            layer.base_layer = ipex.optimize(frozen, dtype=dtype, inplace=True, **options)[0]
