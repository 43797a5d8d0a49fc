"""What is not proven exact is refused, in one line that says what to do; what is proven passes."""

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.engine import modes
from sorted_ds.engine.modes import check_modes, complete_config, mode_warnings

OFFLOAD = {"device": "cpu"}
REFUSED = [
    ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, r"overlap_comm at stage 1 is not exact"),
    ({"zero_optimization": {"overlap_comm": True}}, r"overlap_comm at stage 0 is not exact"),
    ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage = 4 is not proven exact"),
    ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage = True"),
    ({"zero_optimization": {"stage": "auto"}}, r"zero_optimization\.stage = 'auto'"),
    ({"zero_optimization": 2}, r"zero_optimization = 2 should be an object"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, r"a joined view would read other weights"),
    (
        {"zero_optimization": {"stage": 3, "offload_param": OFFLOAD}},
        r"offload_param is proven .* with offload_optimizer",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": OFFLOAD, "offload_optimizer": OFFLOAD}},
        r"offload_param is proven exact at stage 3",
    ),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": OFFLOAD}}, r"Set zero_optimization\.stage to 1, 2 or 3"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
        r"offload_optimizer\.device = 'nvme'",
    ),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, r"offload_optimizer = 'cpu' should be an object"),
    ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, r"size = 'auto' should be a whole number"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, r"should be a whole number of at least 1"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, r"should be a whole number of at least 1"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000.5}}, r"= 1000.5 should be a whole number"),
    (
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": 1001}},
        r"1001 should be an even number of at least 2",
    ),
    (
        {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": True}},
        r"should be a whole number of at least 0",
    ),
    ({"fp16": {"enabled": True}}, r"fp16 .* use bf16"),
    ({"bf16": True}, r"bf16 = True should be an object"),
    ({"bf16": {"enabled": "auto"}}, r"bf16\.enabled = 'auto'"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, r"bf16\.bf16_master_weights_and_grads"),
    ({"data_types": {"grad_accum_dtype": "fp16"}}, r"data_types\.grad_accum_dtype = 'fp16'"),
    ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, r"stage 0 in bf16 accumulates .* only"),
    ({"zero_hpz_partition_size": 2}, r"zero_hpz_partition_size = 2 is not proven exact"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_proven_is_refused(config, message):
    with pytest.raises(UserError, match=message) as raised:
        check_modes(config, "zero.json")
    assert str(raised.value).startswith("zero.json: ")
    assert "\n" not in str(raised.value)


def test_another_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(modes, "version", lambda package: "0.19.9+cu130")
    with pytest.raises(
        UserError, match=r"^DeepSpeed 0\.19\.9\+cu130 is installed.*`pip install deepspeed==0\.19\.8`\.$"
    ):
        check_modes({}, "zero.json")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("zero", [{"stage": stage} for stage in range(4)] + [{"stage": 3, "overlap_comm": True}])
def test_what_is_proven_passes(zero, bf16):
    check_modes({"zero_optimization": zero, "bf16": {"enabled": bf16}}, "zero.json")
    if zero["stage"]:
        check_modes({"zero_optimization": {**zero, "offload_optimizer": OFFLOAD}}, "zero.json")


def test_bf16_accumulates_in_fp32_where_it_can_and_warns_where_not():
    bf16 = {"bf16": {"enabled": True}}
    assert complete_config({**bf16, "zero_optimization": {"stage": 2}}, 4, 2, 1.0)["data_types"] == {
        "grad_accum_dtype": "fp32"
    }
    assert "data_types" not in complete_config(bf16, 4, 2, 1.0)
    assert mode_warnings({**bf16, "zero_optimization": {"stage": 2}}, is_cuda=False) == []
    assert "accumulates gradients in bf16" in mode_warnings(bf16, is_cuda=False)[0]
    assert "has not been run on GPUs" in mode_warnings({}, is_cuda=True)[0]


def test_batch_sizes_follow_from_the_run_and_accumulation_is_our_own():
    full = complete_config({"zero_optimization": {"stage": 1}}, micro_batch_rows=4, num_ranks=3, clip_norm=0.5)
    assert full["train_batch_size"] == full["train_micro_batch_size_per_gpu"] * 3 == 12
    assert (full["gradient_accumulation_steps"], full["managed_gradient_accumulation"]) == (1, False)
    assert full["gradient_clipping"] == 0.5
