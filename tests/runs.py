"""A complete tiny run file on disk: text, DeepSpeed JSON, RUN.toml. For tests of what reads run files."""

import json
from pathlib import Path

TOML = """\
seed = 17
[model]
init = "scratch"
family = "llama"
config = {{ hidden_size = 64, intermediate_size = 64, num_hidden_layers = 3, num_attention_heads = 4, \
num_key_value_heads = 2, max_position_embeddings = 64 }}
[space]
depths = [1, 3]
groups = [1, 2]
ffn = [32, 64]
[sampling]
subnets_per_step = 4
[data]
text = ["text"]
vocab_size = 300
validation_fraction = 0.2
workers = 1
[batch]
step_rows = 8
micro_batch_rows = 2
row_tokens = 32
[train]
steps = {steps}
[eval]
rows = 16
[engine]
deepspeed = "zero.json"
"""


def run_file(folder: Path, steps: int = 400, engine: dict | None = None) -> Path:
    """RUN.toml in `folder` with 30 small documents beside it."""
    (folder / "text").mkdir(parents=True)
    for number in range(30):
        lines = (f"{number} times {k} is {number * k}; a line of text, number {k}.\n" for k in range(40))
        (folder / "text" / f"{number}.txt").write_text("".join(lines))
    (folder / "zero.json").write_text(json.dumps(engine or {"zero_optimization": {"stage": 1}}))
    path = folder / "tiny.toml"
    path.write_text(TOML.format(steps=steps))
    return path
