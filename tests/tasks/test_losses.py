"""The chunked loss equals Hugging Face's own, in value and gradients, and never makes the whole logits."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.data.loader import NO_TARGET
from sorted_ds.families import family_of, nest
from sorted_ds.nested import extract
from sorted_ds.nested.family import LogitsRule
from sorted_ds.tasks import SummedLoss
from sorted_ds.tasks.losses import CHUNK_ELEMENTS, LossHead, Teacher, Terms, attach_loss_head
from tests.batches import LLAMA, batch, summed
from tests.families import SPACE, SUBNETS, VARIANTS, VOCAB, tiny_model, tokens

# fp32: sums over 131 logits and 33 positions in another order, measured at up to 3e-6.
TOLERANCE = 1e-5


def shifted(input_ids: Tensor) -> Tensor:
    """The labels that Hugging Face derives from `labels=input_ids`, with some positions left out."""
    labels = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], NO_TARGET)], dim=1)
    labels[1, 2:6] = NO_TARGET
    return labels


def chunked(model: PreTrainedModel, positions: int) -> SummedLoss:
    """The model with its summed loss, in chunks of so many positions."""
    loss = summed(model)
    loss.model.lm_head.chunk_elements = {"cpu": positions * VOCAB}
    return loss


def hf_summed_loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Hugging Face's own forward with its own labels, which it shifts itself, times its number of targets."""
    unshifted = torch.cat([torch.full_like(labels[:, :1], NO_TARGET), labels[:, :-1]], dim=1)
    return model(input_ids=input_ids, labels=unshifted, use_cache=False).loss * (labels != NO_TARGET).sum()


def assert_equal_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float = TOLERANCE) -> None:
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        if b.grad is None:
            assert a.grad is None, name
            continue
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_hugging_faces(variant):
    plain = tiny_model(variant)
    nested = nest(copy.deepcopy(plain), SPACE)
    input_ids = tokens(rows=3, length=11)
    labels = shifted(input_ids)
    for name in SUBNETS[:4]:
        small = extract(nested, name)
        expected = hf_summed_loss(small, input_ids, labels)
        (expected * 0.125).backward()
        for positions in (1, 7, 33, 1000):
            ours = chunked(copy.deepcopy(small).requires_grad_(True), positions)
            ours.zero_grad()
            nll_sum = ours(**batch(input_ids, labels))
            (nll_sum * 0.125).backward()
            assert nll_sum.dtype == torch.float32
            assert nll_sum.item() == pytest.approx(expected.item(), rel=1e-6)
            assert_equal_gradients(ours.model, small)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_of_a_nested_model_is_that_of_the_extracted_one(variant):
    loss = chunked(nest(tiny_model(variant), SPACE), positions=5)
    input_ids = tokens()
    for name in SUBNETS:
        loss.model.set_subnet(name)
        expected = hf_summed_loss(extract(loss.model, name), input_ids, shifted(input_ids))
        assert loss(**batch(input_ids, shifted(input_ids))).item() == pytest.approx(expected.item(), rel=1e-5)
        with torch.no_grad():
            assert loss(**batch(input_ids, shifted(input_ids))).item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_ends_in_the_caps_and_divisors_of_the_family():
    """Without them the comparisons above must fail: the tiny models' caps and divisors matter."""
    input_ids = tokens()
    for variant, field in (("gemma2", "softcap"), ("granite", "divisor")):
        loss = chunked(tiny_model(variant), positions=5)
        right = loss(**batch(input_ids, shifted(input_ids))).item()
        rule = loss.model.lm_head.rule
        assert getattr(rule, field) != getattr(type(rule)(), field)
        loss.model.lm_head.rule = type(rule)()
        assert abs(loss(**batch(input_ids, shifted(input_ids))).item() / right - 1) > 0.01


@pytest.mark.parametrize("variant", ["llama", "gemma2", "granite"])
def test_gradients_equal_finite_differences(variant):
    model = attach_loss_head(tiny_model(variant).double(), family_of(variant))
    head = model.lm_head
    head.chunk_elements = {"cpu": 2 * VOCAB}
    hidden = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, NO_TARGET, 130, 0, 7])
    direction = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden.requires_grad_()
    head(hidden, labels).backward()
    slope = (hidden.grad * direction).sum().item()
    # The loss itself is computed in fp32, so a step of 1e-2 is what its rounding allows.
    with torch.no_grad():
        difference = head(hidden + 1e-2 * direction, labels) - head(hidden - 1e-2 * direction, labels)
    scale = (hidden.grad.norm() * direction.norm()).item()
    assert abs(difference.item() / 2e-2 - slope) <= 1e-3 * scale


def test_without_targets_the_loss_and_the_gradients_are_zero():
    loss = chunked(tiny_model("llama"), positions=5)
    nll_sum = loss(**batch(tokens(), torch.full((2, 12), NO_TARGET)))
    nll_sum.backward()
    assert nll_sum.item() == 0
    assert not any(parameter.grad.any() for parameter in loss.parameters())


def test_correct_predictions_are_counted_over_targets():
    for variant in ("llama", "gemma2"):
        plain = tiny_model(variant).eval()
        input_ids = tokens(rows=3)
        logits = plain(input_ids).logits
        labels = shifted(input_ids)
        hits = torch.arange(36).reshape(3, 12) % 3 == 0
        labels = torch.where((labels != NO_TARGET) & hits, logits.argmax(-1), labels)
        expected = (logits.argmax(-1) == labels).sum()
        sums = chunked(copy.deepcopy(plain), positions=5)(**batch(input_ids, labels), mode="evaluate")
        assert list(sums) == ["loss", "accuracy"]
        (nll_sum, num_targets), (num_correct, out_of) = sums.values()
        assert num_targets == out_of == (labels != NO_TARGET).sum()
        assert num_correct == expected
        assert num_correct >= 10
        assert not nll_sum.requires_grad
        reference = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        assert nll_sum.item() == pytest.approx(reference.item(), rel=1e-6)


def test_bf16_is_as_close_to_fp32_as_hugging_faces_own_bf16():
    exact = tiny_model("llama")
    input_ids = tokens(rows=4)
    labels = shifted(input_ids)
    hf_summed_loss(exact, input_ids, labels).backward()
    theirs = copy.deepcopy(exact).bfloat16()
    ours = chunked(copy.deepcopy(theirs), positions=5)
    hf_summed_loss(theirs, input_ids, labels).backward()
    nll_sum = ours(**batch(input_ids, labels))
    nll_sum.backward()
    assert nll_sum.dtype == torch.float32
    assert ours.model.lm_head.weight.grad.dtype == torch.bfloat16

    def error(model):
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        return sum((a.grad.float() - b.grad).square().sum().item() for a, b in pairs) ** 0.5

    assert error(ours.model) <= 1.2 * error(theirs)


def test_a_second_backward_through_the_same_loss_is_an_error():
    nll_sum = chunked(tiny_model("llama"), positions=5)(**batch(tokens(), shifted(tokens())))
    nll_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll_sum.backward()


def test_frozen_heads_get_no_gradient():
    loss = chunked(tiny_model("llama"), positions=5)
    reference = copy.deepcopy(loss)
    loss.model.lm_head.weight.requires_grad_(False)
    for model in (loss, reference):
        model(**batch(tokens(), shifted(tokens()))).backward()
    assert loss.model.lm_head.weight.grad is None
    norm, expected = (model.model.model.norm.weight.grad for model in (loss, reference))
    assert torch.equal(norm, expected)


class LogitsMade(TorchDispatchMode):
    """Largest number of positions of a tensor whose last dimension is the vocabulary."""

    positions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            # The head's weight, seen transposed, is the one view with the vocabulary last: not contiguous.
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == VOCAB and tensor.is_contiguous():
                self.positions = max(self.positions, tensor.numel() // VOCAB)
        return made


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_the_whole_logits_never_exist_and_none_are_kept(variant):
    input_ids = tokens(rows=4, length=16)
    loss = chunked(tiny_model(variant), positions=5)
    saved: list[Tensor] = []
    with (
        LogitsMade() as watched,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        loss(**batch(input_ids, shifted(input_ids))).backward()
    assert watched.positions == 5
    assert not any(tensor.dim() and tensor.shape[-1] == VOCAB for tensor in saved)
    with LogitsMade() as watched:
        hf_summed_loss(tiny_model(variant), input_ids, shifted(input_ids)).backward()
    assert watched.positions >= 60, "the watcher sees Hugging Face's logits"


def test_chunks_hold_64_mib_of_logits_unless_told():
    head = attach_loss_head(tiny_model("llama"), LLAMA).lm_head
    assert head.chunk_elements == CHUNK_ELEMENTS
    assert CHUNK_ELEMENTS["cpu"] == 64 * 2**20 // 4


def test_hugging_faces_forward_generation_and_files_work_with_the_head_attached(tmp_path):
    plain = tiny_model("llama, tied").eval()
    model = summed(nest(copy.deepcopy(plain), SPACE)).model.eval()
    assert isinstance(model.lm_head, LossHead)
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    assert torch.equal(
        model.generate(tokens(), max_new_tokens=3, do_sample=False),
        plain.generate(tokens(), max_new_tokens=3, do_sample=False),
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tokens()).logits, plain(tokens()).logits)


def test_parameter_names_start_with_model():
    loss = summed(nest(tiny_model("llama"), SPACE))
    assert all(name.startswith("model.") for name, _ in loss.named_parameters())


def test_an_unknown_family_is_refused():
    model = tiny_model("llama")
    model.config.model_type = "phi3"
    with pytest.raises(UserError, match="model family 'phi3' is not known"):
        summed(model)


# With a teacher and exits

T, LAMBDA, EXIT = 2.0, 0.3, 0.5


def weighted_inputs(variant: str, vocab: int = VOCAB):
    """Returns a head of the variant, the states of three exits, labels, and another model's head and states."""
    head = attach_loss_head(tiny_model(variant), family_of(variant)).lm_head
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(3 * 2, 6, 96, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, 6), generator=generator)
    labels[0, 2:4] = NO_TARGET
    weight, taught = torch.randn(vocab, 24, generator=generator), torch.randn(2, 6, 24, generator=generator)
    return head, hidden, labels, Teacher(taught, weight, LogitsRule(divisor=2.0, softcap=5.0))


def expected_loss(head: LossHead, hidden: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """All logits at once, and autograd."""
    total, weights = torch.zeros(()), (EXIT, EXIT, 1.0)
    for states, weight in zip(hidden.chunk(3), weights, strict=True):
        logits = F.linear(states, head.weight) / head.rule.divisor
        logits = head.rule.softcap * torch.tanh(logits / head.rule.softcap) if head.rule.softcap else logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        if teacher_logits is not None:
            is_target = labels != NO_TARGET
            q = torch.softmax(teacher_logits[is_target] / T, -1)
            log_p = torch.log_softmax(logits[is_target] / T, -1)[:, : q.shape[1]]
            loss = (1 - LAMBDA) * loss + LAMBDA * T**2 * (torch.special.xlogy(q, q) - q * log_p).sum()
        total = total + weight / sum(weights) * loss
    return total


@pytest.mark.parametrize("positions", [1, 5, 100])
@pytest.mark.parametrize("vocab", [VOCAB, VOCAB - 2, VOCAB + 3])
@pytest.mark.parametrize("variant", ["llama", "gemma2", "granite"])
def test_a_weighted_loss_equals_that_of_whole_logits(variant, vocab, positions):
    """A teacher's head may have other padding rows: the first `VOCAB` or fewer are compared."""
    head, hidden, labels, teacher = weighted_inputs(variant, vocab)
    head.chunk_elements = {"cpu": positions * VOCAB}
    logits = 5 * torch.tanh(F.linear(teacher.hidden, teacher.weight[:VOCAB]) / 2 / 5)
    expected = expected_loss(head, hidden, labels, logits)
    (expected * 0.125).backward()
    gradients = [hidden.grad.clone(), head.weight.grad.clone()]
    hidden.grad = head.weight.grad = None
    loss, parts = head(hidden, labels, terms=Terms(LAMBDA, T, EXIT), teacher=teacher)
    (loss * 0.125).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, right in zip([hidden.grad, head.weight.grad], gradients, strict=True):
        assert (found - right).abs().max() <= TOLERANCE * right.abs().max()
    shares = torch.tensor([0.25, 0.25, 0.5])
    assert torch.allclose(((1 - LAMBDA) * parts.nll + LAMBDA * parts.divergence) @ shares, loss)
    assert not parts.nll.requires_grad


def test_a_head_that_teaches_itself_gets_no_gradient_from_its_lesson():
    head, hidden, labels, _ = weighted_inputs("gemma2")
    states = torch.randn(2, 6, 96, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        logits = head.rule.softcap * torch.tanh(F.linear(states, head.weight) / head.rule.softcap)
    expected_loss(head, hidden, labels, logits).backward()
    right, head.weight.grad = head.weight.grad, None
    head(hidden, labels, terms=Terms(LAMBDA, T, EXIT), teacher=Teacher(states))[0].backward()
    assert (head.weight.grad - right).abs().max() <= TOLERANCE * right.abs().max()


def test_without_a_teacher_the_labels_have_all_of_the_weight():
    head, hidden, labels, _ = weighted_inputs("llama")
    loss, parts = head(hidden, labels, terms=Terms(LAMBDA, T, EXIT))
    assert loss.item() == pytest.approx(expected_loss(head, hidden, labels, None).item(), rel=1e-6)
    assert not parts.divergence.any()


def test_what_a_teacher_says_of_itself_has_no_divergence():
    head, hidden, labels, _ = weighted_inputs("llama")
    own = hidden[:2].detach()
    _, parts = head(torch.cat([own, own, own]), labels, terms=Terms(LAMBDA, T, EXIT), teacher=Teacher(own))
    assert parts.divergence.abs().max() < 1e-3 * parts.nll.max()


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_with_a_teacher_the_whole_logits_never_exist_and_none_are_kept(variant):
    head, hidden, labels, teacher = weighted_inputs(variant)
    head.chunk_elements = {"cpu": 5 * VOCAB}
    saved: list[Tensor] = []
    with LogitsMade() as made, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        head(hidden, labels, terms=Terms(LAMBDA, T, EXIT), teacher=teacher)[0].backward()
    assert 0 < made.positions <= 5
    assert all(tensor.numel() <= max(hidden.numel(), head.weight.numel()) for tensor in saved)
