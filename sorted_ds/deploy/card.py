"""Writes the README.md of an exported model: what it is, how it was cut, how good it is, and how to use it.

In: the contents of sorted.json and a sub-network. Out: Markdown.
"""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from sorted_ds.deploy.model_dir import Measured, Sorted
from sorted_ds.nested import Family
from sorted_ds.space import AXES, SubNet
from sorted_ds.tasks import Task

HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [sorted_ds, sortednet, {family}]
---

# {name}

This is an ordinary {family} model. It is the sub-network `{subnet}` of a larger network, which was trained so that its
sub-networks work on their own (SortedNet, arXiv 2309.00255). It needs only `transformers`.

## How it was cut

It has {layers} of `{full}`, and in each of them {widths}. Nothing was trained or rounded after the cut. Before the
model was written, its logits were compared with those of the larger network: in fp32, the largest difference is below
{difference:.0e} of the largest logit.

## Measured
"""

USAGE = """
## Use

```python
from transformers import {auto_class}, AutoTokenizer

folder = {name!r}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```
"""


def model_card(
    trained: Sorted,
    subnet: SubNet,
    family: Family,
    config: PreTrainedConfig,
    task: Task,
    name: str,
    largest_difference: float,
) -> str:
    """Returns the card as Markdown. Its figures come from the measured table, if the sub-network was measured.

    `largest_difference`: how far the logits may be from the nested model's, divided by the largest logit.
    """
    widths = [f"the first {size:,} {AXES[letter].label}" for letter, size in subnet.sizes]
    header = HEADER.format(
        name=name,
        subnet=subnet,
        full=trained.space[-1],
        family=config.model_type,
        layers=_layers(trained.sub_networks.layers_of(subnet)),
        widths=" and ".join(widths[1:]),
        difference=largest_difference,
    )
    rows = {row.subnet: row for row in trained.subnets}
    usage = USAGE.format(name=name, auto_class=family.auto_class.__name__)
    return header + "\n" + _figures(rows, subnet.name, trained, task) + usage


def _layers(numbers: Sequence[int]) -> str:
    """Returns which layers the sub-network has, in words."""
    if list(numbers) == list(range(len(numbers))):
        return f"the first {len(numbers)} layers"
    return f"{len(numbers)} layers (numbers {', '.join(map(str, numbers))}, counted from 0)"


def _figures(rows: dict[str, Measured], name: str, trained: Sorted, task: Task) -> str:
    if name not in rows:
        return "The sub-network was not measured. `sorted-ds eval` on the run's directory measures it.\n"
    shown = [rows[key] for key in dict.fromkeys((name, trained.space[-1])) if key in rows]
    lines = [
        "| | " + " | ".join(f"`{row.subnet}`" for row in shown) + " |",
        "|---" + "|---:" * len(shown) + "|",
        *(_line(f"validation {m.title}", [m.text(row.metrics[m.name]) for row in shown]) for m in task.metrics),
        _line("parameters", [f"{row.parameters:,}" for row in shown]),
        _line("parameters in layers and final norm", [f"{row.non_embedding_parameters:,}" for row in shown]),
        _line("forward FLOPs per token", [f"{row.flops_per_token:,}" for row in shown]),
        _line("key/value cache, bytes per token (2 per element)", [f"{row.kv_bytes_per_token:,}" for row in shown]),
    ]
    note = f"\nThe loss is measured on {shown[0].num_targets:,} validation targets, in rows of {trained.row_tokens}."
    for baseline, loss in (trained.baseline or {}).items():
        note += f" The loss of a {baseline} is {loss:.4f}."
    return "\n".join(lines) + "\n" + note + "\n"


def _line(title: str, values: list[str]) -> str:
    return f"| {title} | " + " | ".join(values) + " |"
