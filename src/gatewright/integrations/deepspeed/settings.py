"""DeepSpeed's settings: the user's own JSON as it is, what the run adds to it, and what is refused and why."""

import json
from pathlib import Path
from typing import Any

from gatewright.train.config import RunConfig

Settings = dict[str, Any]

SECTIONS = {
    "zero_optimization": '{"stage": 1}',
    "fp16": '{"enabled": true}',
    "bf16": '{"enabled": true}',
    "optimizer": '{"type": "Adam"}',
    "scheduler": '{"type": "WarmupLR"}',
}


def deepspeed_settings(config: RunConfig, world: int, *, on_cpu: bool) -> tuple[Settings, list[str]]:
    """Read DeepSpeed's JSON for a run of so many processes, add what it leaves out, and refuse what would not train so.

    Returns:
        What to hand to `deepspeed.initialize`, and a sentence for each setting that was changed.
    """
    settings = _read(config.deepspeed.config)
    said, stage = _fit_to_cpu(settings) if on_cpu else [], zero_stage(settings)
    _refuse_settings(config, world)
    _refuse_layer(config)
    _refuse_half(config, settings)
    _refuse_stage(config, stage)
    _refuse_zero_options(settings, stage)
    _set_batch(settings, config, world)
    _set_clipping(settings, config, stage)
    if stage > 0 and "optimizer" not in settings:
        settings.setdefault("zero_allow_untested_optimizer", True)  # AdamW or SGD: each works on flat parameters.
    if world > 1 and not is_plain(settings) and not config.deepspeed.trust_checkpoint:
        said.append(
            "A run that is stopped goes on from DeepSpeed's own checkpoint, a pickle, and so not by itself: say "
            "`deepspeed.trust_checkpoint=True`, or begin with it."
        )
    return settings, said


def zero_stage(settings: Settings) -> int:
    """Return ZeRO's stage; 0 is none."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def is_half(settings: Settings) -> bool:
    """Whether DeepSpeed holds the parameters in 16 bits."""
    return any(settings.get(name, {}).get("enabled", False) for name in ("fp16", "bf16", "bfloat16"))


def is_plain(settings: Settings) -> bool:
    """Whether optimizer and learning rate are the run's own, and their state is whole on every process."""
    return zero_stage(settings) == 0 and not is_half(settings) and not {"optimizer", "scheduler"} & settings.keys()


def _read(path: str | None) -> Settings:
    if path is None:
        return {}
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"DeepSpeed's settings cannot be read from {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not hold DeepSpeed's settings: these are one JSON object.")
    for name in SECTIONS:
        if not isinstance(settings.get(name, {}), dict):
            raise ValueError(f"{path} has {name} {settings[name]!r}; it is an object, such as {SECTIONS[name]}.")
    return settings


def _refuse_settings(config: RunConfig, world: int) -> None:
    """Refuse settings of the run that DeepSpeed has no place for."""
    ep_size, num_experts = config.parallel.ep_size, config.model.num_experts
    if num_experts > 1 and num_experts % ep_size:
        raise ValueError(
            f"DeepSpeed gives every process equally many experts: `model.num_experts` ({num_experts}) is a multiple of "
            f"`parallel.ep_size` ({ep_size}). Change one of them, or use `engine=torch`."
        )
    if config.data.batch_size % world:
        raise ValueError(
            f"DeepSpeed gives every process equally many images: `data.batch_size` ({config.data.batch_size}) is a "
            f"multiple of the number of processes ({world}). Change one of them, or use `engine=torch`."
        )
    if config.compile or config.precision == "float16":
        raise ValueError(
            "With `engine=deepspeed` leave out `compile=True` and `precision=float16`: DeepSpeed's JSON turns on its "
            'own float16, by "fp16": {"enabled": true}.'
        )
    if config.parallel.shard != "none":
        raise ValueError(
            "DeepSpeed shards by ZeRO: leave out `parallel.shard=fsdp`, and say "
            '"zero_optimization": {"stage": 1} or 2 in DeepSpeed\'s JSON.'
        )
    if world > 1 and config.parallel.batch_norm == "local":
        raise ValueError(
            "DeepSpeed does not keep buffers equal, so that each process would evaluate with its own statistics: use "
            "`parallel.batch_norm=sync`, or `engine=torch`."
        )


def _refuse_layer(config: RunConfig) -> None:
    """Refuse settings that DeepSpeed's own layer has no place for."""
    model = config.model
    plain = model.router == "top-k" and not model.expert_dropout and not model.upcycle_epoch
    if model.needs_engine and (not plain or config.parallel.ep_size > 1):
        raise ValueError(
            "DeepSpeed's layer (model.layer 'deepspeed') has a gate of its own: it needs model.router 'top-k', "
            "parallel.ep_size 1 (its spread experts are not in a run's checkpoints), model.expert_dropout 0 and "
            f"model.upcycle_epoch 0; got {model.router!r}, {config.parallel.ep_size}, {model.expert_dropout} and "
            f"{model.upcycle_epoch}. Change these, or set model.layer to 'gatewright'."
        )


def _refuse_half(config: RunConfig, settings: Settings) -> None:
    """Refuse what does not go with parameters of 16 bits."""
    if is_half(settings) and (config.precision != "float32" or config.optim.ema_decay is not None):
        raise ValueError(
            "DeepSpeed's JSON holds the parameters in 16 bits, and computes in them: say `precision=float32`, which "
            "leaves that alone, and leave `optim.ema_decay` out, because an average of 16 bits does not move."
        )


def _refuse_zero_options(settings: Settings, stage: int) -> None:
    """Refuse options with which ZeRO does not train experts."""
    zero = settings.get("zero_optimization", {})
    needed = {"reduce_scatter": stage in (1, 2), "contiguous_gradients": stage == 2}
    for name in (name for name, wanted in needed.items() if wanted and not zero.get(name, True)):
        raise ValueError(
            f"With ZeRO {stage} DeepSpeed trains experts by {name} alone: leave it out of zero_optimization, or say "
            "true."
        )


def _refuse_stage(config: RunConfig, stage: int) -> None:
    """Refuse what a ZeRO stage cannot train."""
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO has the stages 0, 1, 2 and 3; DeepSpeed's JSON asks for {stage}.")
    if stage == 3 and config.parallel.ep_size > 1:
        raise ValueError(
            f"ZeRO stage 3 cuts every parameter up between all processes, and with `parallel.ep_size` "
            f"{config.parallel.ep_size} an expert is not on all of them: DeepSpeed refuses its own mixtures there too. "
            "Use stage 0, 1 or 2, or `parallel.ep_size=1`."
        )
    if stage == 3 and config.optim.ema_decay is not None:
        raise ValueError(
            "ZeRO stage 3 leaves no whole weights on a process to average: leave `optim.ema_decay` out, or use stage "
            "0, 1 or 2."
        )


def _set_batch(settings: Settings, config: RunConfig, world: int) -> None:
    """Say how large a batch is; a JSON that says something else is the user's to mend."""
    accumulation = config.optim.accumulation_steps
    wanted = {
        "train_batch_size": config.data.batch_size * accumulation,
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": config.data.batch_size // world,
    }
    for name, value in wanted.items():
        if settings.get(name, "auto") not in ("auto", value):
            raise ValueError(
                f"DeepSpeed's JSON says {name} {settings[name]}; with `data.batch_size={config.data.batch_size}`, "
                f"`optim.accumulation_steps={accumulation}` and {world} processes it is {value}. Make them agree, or "
                "leave it out of the JSON."
            )
    settings |= wanted


def _set_clipping(settings: Settings, config: RunConfig, stage: int) -> None:
    """Clip once: by the run's own global norm where gradients are whole, else by DeepSpeed's."""
    max_norm = config.optim.clip_norm
    if max_norm is None:
        return
    if settings.get("gradient_clipping", 0):
        raise ValueError(
            f"DeepSpeed's JSON clips gradients at {settings['gradient_clipping']} and `optim.clip_norm` at {max_norm}: "
            "leave one of them out."
        )
    if stage > 0 or is_half(settings):
        settings["gradient_clipping"] = max_norm


def _fit_to_cpu(settings: Settings) -> list[str]:
    """Turn off what a processor does not have."""
    said = []
    if settings.get("fp16", {}).get("enabled", False):
        settings["fp16"] = {**settings["fp16"], "enabled": False}
        said.append("DeepSpeed's fp16 is off: this run is on the CPU, and trains in float32.")
    optimizer = settings.get("optimizer", {})
    if optimizer.get("type", "").lower() in ("adam", "adamw") and "torch_adam" not in optimizer.get("params", {}):
        settings["optimizer"] = {**optimizer, "params": {**optimizer.get("params", {}), "torch_adam": True}}
        said.append("DeepSpeed's Adam is torch's: its own would be compiled first, and computes the same.")
    return said
