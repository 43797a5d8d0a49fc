"""Checks that DeepSpeed settings are proven exact, and completes them.

In: the engine keys of the user's DeepSpeed JSON. Out: the complete dictionary for `deepspeed.initialize`, or one error
that names a setting that is not proven, and what to use instead. A setting is proven if tests/engine/test_cover.py
compares it with the single-process reference.
"""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sorted_ds.base.errors import UserError

STAGES = (0, 1, 2, 3)

ANY = object()


@dataclass(frozen=True)
class AtLeast:
    """The whole numbers from `smallest` on that are divisible by `multiple_of`, written like 500000000 or 5e8."""

    smallest: int
    multiple_of: int = 1

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return value >= self.smallest and value % self.multiple_of == 0

    def __str__(self) -> str:
        return f"{'an even' if self.multiple_of == 2 else 'a whole'} number of at least {self.smallest}"


TOP_KEYS = {
    "zero_optimization": ANY,
    "bf16": ANY,
    "data_types": ANY,
    "wall_clock_breakdown": ANY,
    "comms_logger": ANY,
}
ZERO_KEYS = {
    "stage": STAGES,
    "overlap_comm": (False, True),
    "contiguous_gradients": (True,),
    "reduce_scatter": (True,),
    "allgather_partitions": (True,),
    "round_robin_gradients": (False,),
    "reduce_bucket_size": AtLeast(1),
    "allgather_bucket_size": AtLeast(2, multiple_of=2),
    "sub_group_size": AtLeast(1),
    "offload_optimizer": ANY,
    "offload_param": ANY,
    "stage3_prefetch_bucket_size": AtLeast(0),
    "stage3_max_live_parameters": AtLeast(0),
    "stage3_max_reuse_distance": AtLeast(0),
    "stage3_param_persistence_threshold": AtLeast(0),
}
SECTION_KEYS: dict[str, dict[str, Any]] = {
    "zero_optimization": ZERO_KEYS,
    "zero_optimization.offload_optimizer": {"device": ("none", "cpu"), "pin_memory": (False, True)},
    "zero_optimization.offload_param": {"device": ("none", "cpu"), "pin_memory": (False, True)},
    "bf16": {"enabled": (False, True)},
    "data_types": {"grad_accum_dtype": ("fp32",)},
}
REASONS = {
    "round_robin_gradients": "it reorders the flat weights, so a joined view would read other weights; leave it out",
    "fp16": "loss scaling was not compared with the reference; use bf16",
}
DEEPSPEED_VERSION = "0.19.8"
"""The only version that works, because this package changes internals of DeepSpeed."""
NEVER_PRINT_STEPS = 2**31


def stage_of(config: dict) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def is_bf16(config: dict) -> bool:
    return bool(config.get("bf16", {}).get("enabled", False))


def is_offloaded(config: dict) -> bool:
    """Returns whether the optimizer's state is kept on the CPU."""
    return _device(config, "offload_optimizer") != "none"


def has_offloaded_weights(config: dict) -> bool:
    """Returns whether weights are kept on the CPU, too, while no layer uses them."""
    return _device(config, "offload_param") != "none"


def _device(config: dict, kind: str) -> str:
    return config.get("zero_optimization", {}).get(kind, {}).get("device", "none")


def check_modes(config: dict, where: str, compile_layers: bool = False) -> None:
    """Raises: UserError for another version of DeepSpeed, a setting that is not proven exact, or a setting that
    compiled layers do not support. Messages name the settings' file `where`.
    """
    _check_deepspeed()
    _check_keys(config, TOP_KEYS, "", where)
    for section, proven in SECTION_KEYS.items():
        given = _section(config, section)
        if not isinstance(given, dict):
            raise UserError(f"{where}: {section} = {given!r} should be an object, like {{}}.")
        _check_keys(given, proven, f"{section}.", where)
    if is_offloaded(config) and stage_of(config) == 0:
        raise UserError(f"{where}: offload_optimizer needs ZeRO. Set zero_optimization.stage to 1, 2 or 3.")
    if has_offloaded_weights(config) and not (stage_of(config) == 3 and is_offloaded(config)):
        raise UserError(
            f"{where}: offload_param is proven exact at stage 3 together with offload_optimizer. Set both, or leave it "
            "out."
        )
    if config.get("zero_optimization", {}).get("overlap_comm", False) and stage_of(config) < 2:
        raise UserError(
            f"{where}: overlap_comm at stage {stage_of(config)} is not exact: parameters that the last micro-batch "
            "does not use are never reduced. Set it to false, or use stage 2 or 3."
        )
    if compile_layers and stage_of(config) == 3:
        raise UserError(
            f"engine.compile = true, but {where} sets zero_optimization.stage = 3, where a layer is compiled in pieces "
            "between the gathers of its weights. Set engine.compile to false, or the stage to 0, 1 or 2."
        )
    if stage_of(config) == 0 and is_bf16(config) and "grad_accum_dtype" in config.get("data_types", {}):
        raise UserError(
            f"{where}: stage 0 in bf16 accumulates gradients in bf16 only. Remove data_types.grad_accum_dtype, "
            "or use stage 1, 2 or 3."
        )


def _check_deepspeed() -> None:
    installed = version("deepspeed")
    if installed.partition("+")[0] != DEEPSPEED_VERSION:
        raise UserError(
            f"DeepSpeed {installed} is installed. sorted_ds changes how {DEEPSPEED_VERSION} accumulates, gathers and "
            f"reduces, and is proven exact with no other. Run `pip install deepspeed=={DEEPSPEED_VERSION}`."
        )


def _section(config: dict, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name, {})
    return config


def _check_keys(given: dict, proven: dict[str, Any], prefix: str, where: str) -> None:
    for key, value in given.items():
        allowed = proven.get(key, ())
        if isinstance(allowed, AtLeast):
            if value not in allowed:
                raise UserError(f"{where}: {prefix}{key} = {value!r} should be {allowed}.")
        elif allowed is not ANY and not any(value == good and type(value) is type(good) for good in allowed):
            reason = REASONS.get(key, "it was not compared with the single-process reference; leave it out")
            raise UserError(f"{where}: {prefix}{key} = {value!r} is not proven exact: {reason}.")


def mode_warnings(config: dict, is_cuda: bool) -> list[str]:
    """Returns a warning for each allowed setting whose results may differ from what the user expects."""
    warnings = []
    if stage_of(config) == 0 and is_bf16(config):
        warnings.append("stage 0 in bf16 accumulates gradients in bf16; stages 1 to 3 accumulate them in fp32")
    if is_cuda:
        warnings.append(
            "proven exact on CPUs only. An earlier version was proven on one GPU that ranks shared "
            "(docs/matrix_cuda.md), but how gradients and weights are kept and sent has changed since, and has not "
            "been run on GPUs"
        )
    return warnings


def complete_config(config: dict, micro_batch_rows: int, num_ranks: int, clip_norm: float) -> dict:
    """Returns the dictionary for `deepspeed.initialize`: the user's engine keys, and the keys that follow from the run.

    `managed_gradient_accumulation` is off, because the engine accumulates itself: it calls `step()` once per optimizer
    step.
    """
    stage = stage_of(config)
    # DeepSpeed's default is on at stage 3 (0.19.8, runtime/zero/config.py). It is stated, as stage 1 must have it off.
    zero = {"stage": stage, "overlap_comm": stage == 3, **config.get("zero_optimization", {})}
    full = {**config, "zero_optimization": zero}
    if is_bf16(config) and stage > 0:
        full["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    clip_here = stage > 0 or is_bf16(config)
    full.update(
        train_micro_batch_size_per_gpu=micro_batch_rows,
        gradient_accumulation_steps=1,
        train_batch_size=micro_batch_rows * num_ranks,
        gradient_clipping=clip_norm if clip_here else 0.0,
        managed_gradient_accumulation=False,
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,  # optimizers.py chooses
        steps_per_print=NEVER_PRINT_STEPS,
    )
    return full
