"""Which DeepSpeed settings are proven exact, and what is added to them.

In: the engine keys of the user's DeepSpeed JSON. Out: the complete dictionary for `deepspeed.initialize`, or one
error that names what is not proven and what to use instead. Proven means: compared with the single-process reference
by tests/test_engine_exact.py.
"""

from sorted_ds.errors import UserError

STAGES = (0, 1, 2, 3)

ANY = object()
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
    "reduce_bucket_size": ANY,
    "allgather_bucket_size": ANY,
    "sub_group_size": ANY,
    "stage3_prefetch_bucket_size": (0,),
    "stage3_max_live_parameters": ANY,
    "stage3_max_reuse_distance": ANY,
    "stage3_param_persistence_threshold": ANY,
}
REASONS = {
    "offload_optimizer": "its gradients were stale under changing sub-networks; leave it out",
    "offload_param": "it was not compared with the reference; leave it out",
    "round_robin_gradients": "it reorders the flat weights, and a joined view would read other ones; leave it out",
    "stage3_prefetch_bucket_size": "a prefetch gathers layers that the draw skips; set it to 0",
    "fp16": "loss scaling was not compared with the reference; use bf16",
}
NEVER_PRINT_STEPS = 2**31


def stage_of(config: dict) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def is_bf16(config: dict) -> bool:
    return bool(config.get("bf16", {}).get("enabled", False))


def check_modes(config: dict, where: str) -> None:
    """Raises: UserError for the first setting that is not proven exact."""
    _check_keys(config, TOP_KEYS, "", where)
    zero = config.get("zero_optimization", {})
    _check_keys(zero, ZERO_KEYS, "zero_optimization.", where)
    if zero.get("overlap_comm", False) and stage_of(config) < 2:
        raise UserError(
            f"{where}: overlap_comm at stage {stage_of(config)} is not exact: parameters that the last micro-batch "
            "does not use are never reduced. Set it to false, or use stage 2 or 3."
        )
    if (
        stage_of(config) == 0
        and config.get("data_types", {}).get("grad_accum_dtype", "bf16") != "bf16"
        and is_bf16(config)
    ):
        raise UserError(
            f"{where}: stage 0 in bf16 accumulates gradients in bf16 only. Remove data_types.grad_accum_dtype, "
            "or use stage 1, 2 or 3."
        )


def _check_keys(given: dict, proven: dict, prefix: str, where: str) -> None:
    for key, value in given.items():
        allowed = proven.get(key, ())
        if allowed is not ANY and value not in allowed:
            reason = REASONS.get(key, "it was not compared with the single-process reference; leave it out")
            raise UserError(f"{where}: {prefix}{key} = {value!r} is not proven exact: {reason}.")


def complete(config: dict, micro_batch_rows: int, num_ranks: int, clip_norm: float) -> dict:
    """The dictionary for `deepspeed.initialize`: the user's engine keys and what follows from the run.

    Accumulation is our own (`managed_gradient_accumulation` off): one `step()` per optimizer step.
    """
    zero = {"stage": stage_of(config), "overlap_comm": False, **config.get("zero_optimization", {})}
    if zero["stage"] == 3:
        zero.setdefault("stage3_prefetch_bucket_size", 0)
    full = {**config, "zero_optimization": zero}
    if is_bf16(config) and zero["stage"] > 0:
        full["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    clip_here = zero["stage"] > 0 or is_bf16(config)
    full.update(
        train_micro_batch_size_per_gpu=micro_batch_rows,
        gradient_accumulation_steps=1,
        train_batch_size=micro_batch_rows * num_ranks,
        gradient_clipping=clip_norm if clip_here else 0.0,
        managed_gradient_accumulation=False,
        zero_allow_untested_optimizer=True,
        steps_per_print=NEVER_PRINT_STEPS,
    )
    return full
