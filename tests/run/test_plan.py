"""The plan's numbers equal independent arithmetic, and its checks refuse what training would trip over."""

import json
import time

import pytest

from sorted_ds.base.errors import UserError
from sorted_ds.run.checks import check_run
from sorted_ds.run.plan import make_plan, state_bytes
from sorted_ds.run.run_file import load_run
from tests.runs import run_file

SPACE_SIZE = 8


def planned(folder, *overrides, num_ranks=2, **kwargs):
    run = load_run(run_file(folder, **kwargs), overrides)
    config, space = check_run(run)
    return make_plan(run, space, config, num_ranks)


def test_visits_and_tokens_add_up_to_the_run(tmp_path):
    plan = planned(tmp_path)
    assert len(plan.subnets) == SPACE_SIZE
    assert sum(s.visits for s in plan.subnets) == pytest.approx(400 * 4)
    assert sum(s.tokens for s in plan.subnets) == pytest.approx(400 * 8 * 32)
    assert plan.tokens_per_step == 8 * 32


def test_parameters_are_those_of_a_llama_of_that_size(tmp_path):
    plan = planned(tmp_path)
    smallest = plan.subnets[0]
    assert smallest.subnet == "d1-g1-f32"
    # Head dimension 16, two query heads a group: q, o 64 x 32, k, v 64 x 16; three 64 x 32 of the mlp; two norms.
    layer = 2 * 64 * 32 + 2 * 64 * 16 + 3 * 64 * 32 + 2 * 64
    assert smallest.parameters == 2 * 300 * 64 + layer + 64
    assert smallest.non_embedding_parameters == layer + 64


def test_compute_is_three_forward_passes_of_what_is_active(tmp_path):
    plan = planned(tmp_path)
    by_hand = sum(3 * s.flops_per_token * s.visits * 2 * 32 for s in plan.subnets)
    assert plan.flops.run == pytest.approx(by_hand)
    total = 400 * 8 * 32
    assert plan.flops.full_alone == pytest.approx(3 * plan.subnets[-1].flops_per_token * total)
    assert plan.flops.each_alone == pytest.approx(3 * sum(s.flops_per_token for s in plan.subnets) * total)
    assert plan.flops.run < plan.flops.full_alone < plan.flops.each_alone
    again = planned(tmp_path / "again", "model.activation_checkpointing=true")
    assert again.flops.run == pytest.approx(4 / 3 * by_hand)


@pytest.mark.parametrize(
    ("num_ranks", "forwards", "rows", "padded"), [(1, 1, 2, 0.0), (2, 1, 1, 0.0), (3, 1, 1, 1 / 3)]
)
def test_rows_are_dealt_over_the_ranks(tmp_path, num_ranks, forwards, rows, padded):
    plan = planned(tmp_path, num_ranks=num_ranks)
    assert (plan.forwards_per_subnet, plan.rows_per_forward) == (forwards, rows)
    assert plan.padded_fraction == pytest.approx(padded)


def test_memory_falls_with_the_stage_and_is_one_ranks_at_stage_0(tmp_path):
    plan = planned(tmp_path, num_ranks=4)
    full = plan.subnets[-1].parameters
    held = plan.memory.bytes_per_rank
    assert held == {0: 16 * full, 1: (8 + 12 / 4) * full, 2: (4 + 16 / 4) * full, 3: (20 / 4) * full}
    assert (plan.memory.precision, plan.memory.chosen_stage) == ("fp32", 1)


def test_what_is_sent_follows_from_the_sampled_sub_networks(tmp_path):
    plan = planned(tmp_path, num_ranks=4)
    full, mean = plan.subnets[-1].parameters, sum(s.share_of_samples * s.parameters for s in plan.subnets)
    active = 4 * plan.subnets_per_step * plan.forwards_per_subnet * mean
    assert 2 * 4 * mean * 3 / 4 < plan.sent_bytes[0] < 2 * 4 * full * 3 / 4
    assert plan.sent_bytes[1] - plan.sent_bytes[0] == pytest.approx(4 * full * 3 / 4)
    assert plan.sent_bytes[2] == pytest.approx((4 * full + 2 * active) * 3 / 4, rel=0.01)
    assert plan.sent_bytes[3] == pytest.approx(2 * active * 3 / 4, rel=0.01)
    assert set(planned(tmp_path / "alone", num_ranks=1).sent_bytes.values()) == {0}


def test_bf16_and_sgd_change_the_bytes():
    adamw, sgd = state_bytes(2, True, "adamw"), state_bytes(2, True, "sgd")
    assert (adamw.weights, adamw.gradients, adamw.optimizer) == (2, 4, 12)
    assert sgd.optimizer == 4
    offloaded = [state_bytes(stage, True, "adamw", offload=True).optimizer for stage in range(4)]
    assert offloaded == [12, 0, 0, 0]
    weights = [state_bytes(stage, True, "adamw", True, offload_weights=True).weights for stage in range(4)]
    assert weights == [2, 2, 2, 0]


def test_sub_networks_of_few_visits_are_warned_about(tmp_path):
    assert planned(tmp_path / "long").warnings == ()
    warning = planned(tmp_path / "short", steps=100).warnings[0]
    assert warning.startswith("8 of 8 sub-networks are expected to get fewer than 100 visits")


def test_an_8b_network_is_planned_in_seconds(tmp_path):
    path = run_file(tmp_path)
    text = path.read_text()
    config = text[text.index("config = ") : text.index("[space]")]
    large = (
        "config = { hidden_size = 4096, intermediate_size = 14336, num_hidden_layers = 32, num_attention_heads = 32, "
        "num_key_value_heads = 8, vocab_size = 128256, rope_theta = 500000.0 }\n"
    )
    text = text.replace(config, large).replace("[1, 3]", "[8, 16, 24, 32]").replace("[1, 2]", "[4, 8]")
    path.write_text(text.replace("[32, 64]", "[3584, 7168, 14336]"))
    start = time.perf_counter()
    run = load_run(path)
    model, space = check_run(run)
    plan = make_plan(run, space, model, 8)
    assert time.perf_counter() - start < 10
    assert plan.subnets[-1].parameters == 8_030_261_248  # Llama 3 8B's own count


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('family = "llama"', 'family = "lama"', r"model family 'lama' is not known"),
        ("hidden_size = 64, i", "hiden_size = 64, i", r"model\.config sets 'hiden_size'.*Did you mean 'hidden_size'\?"),
        (
            "depths = [1, 3]",
            "depths = [1, 4]",
            r"the space's largest sub-network is d4-g2-f64, but the model is d3-g2-f64",
        ),
        ('text = ["text"]', 'text = ["txt"]', r"data\.text.*txt"),
        (
            "step_rows = 8",
            "step_rows = 9",
            r"batch\.step_rows = 9 cannot be cut into 4 equal shares \(.*\)\. Nearest that can: 8, 12\.",
        ),
        (
            "subnets_per_step = 4",
            'subnets_per_step = 4\nstrategy = "best"',
            r"sampling\.strategy = 'best' is not known\. Known: uniform, stratified, sandwich, full_plus, full\.",
        ),
        (
            "subnets_per_step = 4",
            'subnets_per_step = 1\nstrategy = "sandwich"',
            r"sampling\.subnets_per_step = 1, but sandwich needs at least 2",
        ),
        ("groups = [1, 2]\n", "", r"are named like d3-f64, but llama has the axes d, g, f"),
        (
            "groups = [1, 2]",
            "groups = [1, 2]\nwidths = [8]",
            r"named like d3-g2-f64-w8, but llama has the axes d, g, f",
        ),
        (
            "groups = [1, 2]",
            'groups = [1, 2]\nsubnets = ["d3-g2-f64"]',
            r"space\.subnets is set together with space\.depths, space\.groups, space\.ffn",
        ),
        ("groups = [1, 2]", "groups = [1, 2]\nlayer_order = [0, 1]", r"is not a permutation of the 3 layers"),
        ("seed = 17", 'seed = 17\ntask = "causal"', r"task = 'causal' is not known\. Known: causal_lm\."),
        ("vocab_size = 300", 'tokenizer = "no/such/one"', r"no/such/one"),
        ('"zero.json"', '"zero9.json"', r"zero9\.json"),
    ],
)
def test_what_training_would_trip_over_is_refused(tmp_path, old, new, message):
    path = run_file(tmp_path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=message):
        check_run(load_run(path))


def test_a_mode_that_is_not_proven_is_refused(tmp_path):
    engine = {"zero_optimization": {"stage": 1, "overlap_comm": True}}
    with pytest.raises(UserError, match=r"zero\.json: overlap_comm at stage 1 is not exact"):
        planned(tmp_path, engine=engine)


def test_a_number_of_the_run_file_in_the_json_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"zero\.json sets 'gradient_accumulation_steps'"):
        planned(tmp_path, engine={"gradient_accumulation_steps": 4})


def test_planning_tokenises_nothing(tmp_path):
    planned(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"text", "zero.json", "tiny.toml"}
    assert json.loads((tmp_path / "zero.json").read_text())
