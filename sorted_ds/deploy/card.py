"""Writes the README.md of an exported model: what it is, how it was cut, how good it is, and how to use it.

In: the contents of sorted.json and a sub-network. Out: Markdown.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import PreTrainedConfig

from sorted_ds.deploy.license import card_tags, license_text
from sorted_ds.deploy.model_dir import Base, Measured, Sorted
from sorted_ds.nested import Family
from sorted_ds.space import AXES, SubNet
from sorted_ds.tasks import Task

HEADER = """\
---
library_name: transformers
pipeline_tag: {pipeline_tag}
{base}tags: [sorted_ds, sortednet, {family}]
---

# {name}

This is an ordinary {family} model. It is the sub-network `{subnet}` of a larger network, which was trained so that its
sub-networks work on their own (SortedNet, arXiv 2309.00255). It needs only `transformers`.

## How it was cut

It has {layers} of `{full}`, and in each of them {widths}. {trained}Nothing was trained or rounded after the cut. Before
the model was written, its logits were compared with those of the larger network: in fp32, the largest difference is
below {difference:.0e} of the largest logit.

## Measured
"""

USAGE = """
## License

{license}

## Use

```python
{usage}
```

{versions}
"""
VERSIONS = "It loads in transformers 5 and 4.57."
LINE_WIDTH = 100
"""The number of columns of a paragraph in the file."""
CAPPED = """ Version 4.57 leaves out this model's cap of attention scores unless it is told to use
`from_pretrained(..., attn_implementation="eager")`; its own gemma2 models need the same."""


def model_card(
    trained: Sorted,
    subnet: SubNet,
    family: Family,
    config: PreTrainedConfig,
    task: Task,
    folder: Path,
    name: str,
    largest_difference: float,
) -> str:
    """Returns the card as Markdown. Its figures come from the measured table, if the sub-network was measured.

    `folder`: where the model was written. `name`: the name that the folder will get. `largest_difference`: how far the
    logits may be from the nested model's, divided by the largest logit.
    """
    widths = [f"the first {size:,} {AXES[letter].label}" for letter, size in subnet.sizes]
    header = HEADER.format(
        name=name,
        pipeline_tag=task.pipeline_tag,
        base=_yaml(card_tags(trained.base)),
        subnet=subnet,
        full=trained.space[-1],
        family=config.model_type,
        layers=_layers(trained.sub_networks.layers_of(subnet)),
        widths=" and ".join(widths[1:]),
        trained="" if subnet.name in trained.space else "This combination of sizes was never trained itself. ",
        difference=largest_difference,
    )
    rows = {row.subnet: row for row in trained.subnets}
    usage = USAGE.format(
        license=_paragraph(license_text(trained.base, folder)),
        usage=task.usage(folder, name, family.auto_class.__name__),
        versions=_paragraph(VERSIONS + (CAPPED if getattr(config, "attn_logit_softcapping", None) else "")),
    )
    return _even(header) + "\n" + _figures(rows, subnet.name, trained, task) + usage


def _yaml(tags: Base) -> str:
    """Returns the tags as lines of the header."""
    if not tags:
        return ""
    return yaml.safe_dump(dict(tags), sort_keys=False, allow_unicode=True, width=float("inf"))


def _even(markdown: str) -> str:
    """Returns Markdown without code, with every paragraph of text on even lines."""
    parts = markdown.split("\n\n")
    return "\n\n".join(_paragraph(part) if part[:1].isalpha() else part for part in parts)


def _paragraph(text: str) -> str:
    """Returns the text on even lines, without breaks in a name or a link."""
    return textwrap.fill(text, LINE_WIDTH, break_long_words=False, break_on_hyphens=False)


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
    note = f"The loss is measured on {shown[0].num_targets:,} validation targets, in rows of {trained.row_tokens}."
    for baseline, loss in (trained.baseline or {}).items():
        note += f" The loss of a {baseline} is {loss:.4f}."
    return "\n".join(lines) + "\n\n" + _paragraph(note) + "\n"


def _line(title: str, values: list[str]) -> str:
    return f"| {title} | " + " | ".join(values) + " |"
