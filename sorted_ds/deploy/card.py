"""The README.md of an exported model: what it is, how it was cut, how good it is, how to use it."""

from transformers import PreTrainedConfig

from sorted_ds.deploy.model_dir import Measured, Sorted
from sorted_ds.space import SubNet

HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [sorted_ds, sortednet, {family}]
---

# {name}

An ordinary {family} model: sub-network `{subnet}` of a larger network that was trained so that its prefixes work on
their own (SortedNet, arXiv 2309.00255). It needs `transformers` alone.

## How it was cut

From `{full}`: the first {depth} layers, in each the first {groups} attention groups ({heads} query heads of
{head_dim} channels) and the first {ffn} feed-forward channels; embeddings, final norm and output head are shared.
Nothing was trained or rounded afterwards. Its logits were compared with the nested model's before it was written:
the largest difference is below 1e-5 of the largest logit, computed in fp32.

## Measured
"""

USAGE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {name!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
"""


def model_card(trained: Sorted, subnet: SubNet, config: PreTrainedConfig, name: str) -> str:
    """Markdown; the figures come from the measured table, or say that there are none."""
    header = HEADER.format(
        name=name,
        subnet=subnet,
        full=trained.space[-1],
        family=config.model_type,
        depth=subnet.depth,
        groups=subnet.groups,
        ffn=subnet.ffn,
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
    )
    rows = {row.subnet: row for row in trained.subnets}
    return header + "\n" + _figures(rows, subnet.name, trained) + USAGE.format(name=name)


def _figures(rows: dict[str, Measured], name: str, trained: Sorted) -> str:
    if name not in rows:
        return "Not measured. `sorted-ds eval` on the run's directory measures it.\n"
    shown = [rows[key] for key in dict.fromkeys((name, trained.space[-1])) if key in rows]
    lines = [
        "| | " + " | ".join(f"`{row.subnet}`" for row in shown) + " |",
        "|---" + "|---:" * len(shown) + "|",
        _line("validation loss, nats per token", [f"{row.loss:.4f}" for row in shown]),
        _line("perplexity", [f"{row.perplexity:.2f}" for row in shown]),
        _line("next-token accuracy", [f"{row.accuracy:.1%}" for row in shown]),
        _line("parameters", [f"{row.parameters:,}" for row in shown]),
        _line("of them in layers and final norm", [f"{row.non_embedding_parameters:,}" for row in shown]),
        _line("forward FLOPs per token", [f"{row.flops_per_token:,}" for row in shown]),
        _line("key/value cache, bytes per token (2 per element)", [f"{row.kv_bytes_per_token:,}" for row in shown]),
    ]
    note = f"\nOn {shown[0].num_targets:,} validation tokens, in rows of {trained.row_tokens}."
    if trained.unigram_nats is not None:
        note += f" A unigram model of the training text: {trained.unigram_nats:.4f} nats per token."
    return "\n".join(lines) + "\n" + note + "\n"


def _line(title: str, values: list[str]) -> str:
    return f"| {title} | " + " | ".join(values) + " |"
