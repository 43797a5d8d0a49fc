"""Text of a sub-network: as transformers writes it alone, for one prompt or several, and one line for bad input."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TextStreamer

from sorted_ds import UserError, load
from sorted_ds.commands.cli import main
from sorted_ds.deploy.export import export
from sorted_ds.deploy.generation.choose_draft import choose_draft
from sorted_ds.deploy.generation.generate import Options, generate
from sorted_ds.deploy.generation.speculative import Speculation
from tests.trained import set_keys, tokenizer, trained_run

PROMPTS = ["def f(x):", "import", "a"]
SMALL = "d2-g3-f80"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = trained_run(tmp_path_factory.mktemp("run"), layer_order=(2, 0, 3, 1))
    set_keys(folder / "model" / "generation_config.json", eos_token_id=[34, 60], do_sample=True, temperature=0.3)
    return folder


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory) -> list[str]:
    """What plain transformers writes with the exported sub-network, one prompt at a time."""
    out = tmp_path_factory.mktemp("out") / "small"
    export(run, [SMALL], [out])
    plain, words, texts = AutoModelForCausalLM.from_pretrained(out), tokenizer(), []
    for prompt in PROMPTS:
        ids = words(prompt, return_tensors="pt").input_ids
        found = plain.generate(ids, do_sample=False, temperature=None, max_new_tokens=20, pad_token_id=0)
        texts.append(words.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("draft", [None, "d1-g1-f32", "d1-g3-f80"])
def test_a_batch_of_prompts_gives_what_transformers_writes_for_each(run, expected, draft):
    family = load(run)
    assert family.generate(PROMPTS, subnet=SMALL, draft=draft, max_new_tokens=20) == expected
    assert family.generate(PROMPTS[0], subnet=SMALL, draft=draft, max_new_tokens=20) == expected[:1]


def test_a_completion_counts_its_tokens_up_to_the_end(run, expected):
    family = load(run)
    found = generate(family[SMALL], family.tokenizer, PROMPTS, Options(max_new_tokens=20))
    assert [completion.num_prompt_tokens for completion in found] == [9, 6, 1]
    assert [completion.num_tokens for completion in found] == [20, len(expected[1]), 20], "the second one ends early"


def test_chat_puts_the_prompt_into_the_template(run):
    family = load(run)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        family.generate("hi", chat=True)
    family.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}bot:"
    found = family.generate("hi", chat=True, max_new_tokens=8)
    assert found == family.generate("<user> hi\nbot:", max_new_tokens=8)
    assert found != family.generate("hi", max_new_tokens=8)


def test_drawn_text_follows_the_seed_and_the_options(run):
    family, texts = load(run), []
    for seed, top_k in ((1, 50), (1, 50), (2, 50), (1, 1)):
        torch.manual_seed(seed)
        texts.append(family.generate(PROMPTS, subnet=SMALL, temperature=1.5, top_k=top_k, max_new_tokens=20))
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == family.generate(PROMPTS, subnet=SMALL, max_new_tokens=20), "the likeliest token alone"


@pytest.mark.parametrize("draft", [[], ["--draft", "d1-g3-f80", "--draft-tokens", "3"]], ids=str)
def test_the_command_streams_one_prompt_and_prints_several(run, expected, draft, capsys):
    command = ["generate", str(run), "--subnet", SMALL, *draft, "--max-new-tokens", "20", "--device", "cpu"]
    assert main([*command, "--prompt", PROMPTS[0]]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected[0] + "\n"
    assert (f"of {SMALL}" in printed.err) == bool(draft)
    assert main([*command, *(word for prompt in PROMPTS for word in ("--prompt", prompt))]) == 0
    whole = [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]
    assert capsys.readouterr().out == "\n\n".join(whole) + "\n"
    assert main([*command, "--prompt", PROMPTS[0], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["completions"][0]["text"] == expected[0]
    assert ("draft" in facts) == bool(draft)


def test_a_prompt_can_come_from_standard_input(run, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.read", lambda: PROMPTS[0], raising=False)
    assert main(["generate", str(run), "--subnet", SMALL, "--prompt", "-", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == expected[0] + "\n"


def test_a_streamer_gets_the_text_while_it_is_written(run, expected, capsys):
    family = load(run)
    streamer = TextStreamer(family.tokenizer, skip_prompt=True)
    family.generate(PROMPTS[0], subnet=SMALL, draft="d1-g3-f80", max_new_tokens=20, streamer=streamer)
    assert capsys.readouterr().out == expected[0] + "\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": math.nan}, "temperature = nan is not a number from 0 on"),
        ({"temperature": -0.5}, "temperature = -0.5 is not a number from 0 on"),
        ({"temperature": math.inf}, "temperature = inf is not a number from 0 on"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5 is not above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": math.nan}, "top_p = nan is not above 0 and at most 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k = 0 is below 1"),
        ({"top_k": 5}, "Set a temperature above 0, too"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is below 1"),
        (
            {"max_new_tokens": 56},
            r"prompt 1 has 9 tokens, .* context of 64\. Ask for at most 55 new tokens, or shorten",
        ),
        ({"prompts": ["a", "b" * 64]}, r"prompt 2 has 64 tokens, .* context of 64\. Shorten the prompt"),
        ({"prompts": ["a", ""]}, "prompt 2 of 2 is empty"),
        ({"prompts": []}, "there is no prompt"),
        ({"subnet": "d3-g3-f79"}, r"d3-g3-f79 cannot be cut from this family\. Nearest that can"),
        ({"draft": "d3-g3-f79"}, r"d3-g3-f79 cannot be cut from this family\. Nearest that can"),
        ({"subnet": "d1-g1-f32", "draft": SMALL}, f"{SMALL} has .* parameters, and d1-g1-f32 has .* Name a draft that"),
    ],
)
def test_bad_input_is_one_line(run, given, message):
    with pytest.raises(UserError, match=message) as raised:
        load(run).generate(**{"prompts": PROMPTS, "max_new_tokens": 4, **given})
    assert "\n" not in str(raised.value)


def test_as_many_tokens_as_the_advice_says_fit(run):
    assert len(load(run).generate(PROMPTS, draft="d1-g1-f32", max_new_tokens=55)) == 3


def test_a_directory_that_is_no_trained_family_or_is_not_complete_is_one_line(run, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    written = trained_run(tmp_path / "run")
    (written / "model" / "model.safetensors").unlink()
    for folder, message in (
        (tmp_path / "other", "Name the directory of a run whose training has ended"),
        (written, "holds neither model.safetensors"),
    ):
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", "a", "--device", "cpu"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_a_number_of_draft_tokens_needs_a_draft(run, capsys):
    command = ["generate", str(run), "--prompt", "a", "--max-new-tokens", "2", "--draft-tokens", "3", "--device", "cpu"]
    assert main(command) == 2
    assert "Name one with --draft, or leave out --draft-tokens." in capsys.readouterr().err
    assert main([*command, "--draft", "d1-g1-f32"]) == 0


def test_auto_tries_drafts_and_the_text_stays_the_same(run, expected, capsys):
    family = load(run)
    assert family.generate(PROMPTS, subnet=SMALL, draft="auto", max_new_tokens=20) == expected
    command = ["generate", str(run), "--subnet", SMALL, "--draft", "auto", "--max-new-tokens", "20", "--device", "cpu"]
    assert main([*command, "--prompt", PROMPTS[0]]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected[0] + "\n"
    assert re.search(r"draft: (none|d\d-g\d-f\d+) \(speeds as ratios to plain decoding: d1-", printed.err)
    alone = choose_draft(family.full, family.space, "d1-g1-f32", family.tokenizer, PROMPTS, Options(4))
    assert (alone.draft, alone.speeds) == (None, {}), "the smallest has no draft"


def test_the_fastest_is_chosen_and_plain_decoding_where_nothing_is_faster(run, monkeypatch):
    """The speeds are given here, so that the choice does not depend on the machine."""
    family = load(run)
    for fast, chosen in ((3.0, "d2-g3-f80"), (0.5, None)):
        monkeypatch.setattr(
            "sorted_ds.deploy.generation.choose_draft.generate",
            lambda model, *args, fast=fast, **kwargs: speed_of(model, fast),
        )
        monkeypatch.setattr("sorted_ds.deploy.generation.choose_draft._tokens_per_second", lambda write: write())
        found = choose_draft(family.full, family.space, "d4-g4-f112", family.tokenizer, PROMPTS, Options())
        assert found.draft == chosen
        assert found.speeds["d2-g3-f80"] == fast


def speed_of(model, fast: float) -> float:
    if not isinstance(model, Speculation):
        return 1.0
    config = model.draft.draft.config
    return fast if (config.num_hidden_layers, config.intermediate_size) == (2, 80) else 0.9
