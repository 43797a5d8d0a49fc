"""buffers.safetensors: the persistent buffers of a model, such as the running statistics of batch norm.

In: `Sharded.buffers()`, which is the same on every rank. On disk: one tensor for each buffer, under the buffer's name,
with its own type and shape. Rank 0 writes the file if the model has buffers. On restore every rank reads it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sorted_ds.base.errors import UserError

BUFFERS_FILE = "buffers.safetensors"


def copy_buffers(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies in host memory, which training does not change.

    Raises: OSError when there is not enough memory.
    """
    try:
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in buffers.items()}
    except (RuntimeError, MemoryError) as error:
        raise OSError(f"no host memory for a copy of the model's buffers: {str(error).splitlines()[0]}") from None


def read_buffers(folder: Path, files: Collection[str], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the saved buffers by name; `files` are the checkpoint's, `expected` are the buffers of this run's model.

    A floating-point buffer may have been saved in another precision: a run may change its precision.

    Raises: UserError when the two have different names, shapes or types.
    """
    found = load_file(folder / BUFFERS_FILE) if BUFFERS_FILE in files else {}
    for name in dict.fromkeys([*expected, *found]):
        there, here = _describe(found.get(name)), _describe(expected.get(name))
        if there != here:
            raise UserError(
                f"{folder} holds the buffers of another model: {name} is {there} there, {here} here. Set another "
                "run_dir, or make the run file as it was."
            )
    return found


def _describe(buffer: Tensor | None) -> str:
    if buffer is None:
        return "missing"
    kind = "floating-point" if buffer.is_floating_point() else str(buffer.dtype).removeprefix("torch.")
    return f"{kind} {list(buffer.shape)}"
