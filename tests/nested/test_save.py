"""A nested model is written as Hugging Face writes the plain one, and never held whole meanwhile."""

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sorted_ds.families import nest
from sorted_ds.nested import save_full
from tests.families import SPACE, VARIANTS, tiny_model
from tests.memory import LiveBytes

OLDER_NAMES = {"torch_dtype", "rope_theta", "rope_scaling"}
"""What transformers 4 reads, and tests/deploy/test_older_transformers.py tries."""
LARGEST_FILES = {"one file": "1GB", "shards": "100KB"}


@pytest.mark.parametrize("largest", LARGEST_FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_files_are_those_of_the_plain_model(variant, dtype, largest, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    plain = nn.Module.to(tiny_model(variant), dtype)
    plain.save_pretrained(theirs, max_shard_size=LARGEST_FILES[largest])
    model = nest(plain, SPACE)
    model.set_subnet(SPACE.smallest)
    save_full(model, model.named_parameters(), ours, LARGEST_FILES[largest])
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    assert len([name for name in names if name.endswith(".safetensors")]) == 1 or largest == "shards"
    for name in names:
        if name.endswith(".safetensors"):
            expected, found = load_file(theirs / name), load_file(ours / name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], tensor) for key, tensor in found.items())
        else:
            expected, found = (json.loads((folder / name).read_text()) for folder in (theirs, ours))
            assert {key: found[key] for key in expected} == expected
            assert found.keys() - expected.keys() == (OLDER_NAMES if name == "config.json" else set())


def test_no_more_than_a_file_is_held(tmp_path):
    model = nest(tiny_model("llama"), SPACE)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    size = whole // 10

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            yield name, torch.ones(parameter.shape)

    with LiveBytes() as live:
        save_full(model, gathered(), tmp_path / "model", size)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 5
    assert live.peak <= size + 3 * largest < whole / 3
