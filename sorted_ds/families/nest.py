"""`nest(model, space)`, which finds the family of a model by its `model_type`.

In: a Hugging Face model, or the name of a family. Out: the nested model, or the `Family`. A new kind of architecture is
a file beside `decoder.py` and an entry in `FAMILIES`.
"""

from transformers import PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.families.decoder import DECODERS
from sorted_ds.nested.family import Family
from sorted_ds.nested.nest import NestedModel, nest_as
from sorted_ds.space import SubNetSpace

FAMILIES: dict[str, Family] = {**DECODERS}
"""By Hugging Face's `model_type`."""


def family_of(model_type: str) -> Family:
    """Raises: UserError for an unknown family; it names the known ones and how to add one."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model family {model_type!r} is not known. Known: {', '.join(FAMILIES)}. "
            "docs/add-a-family.md says how to add one."
        )
    return FAMILIES[model_type]


def nest(model: PreTrainedModel, space: SubNetSpace) -> NestedModel:
    """Makes `model` able to run every sub-network of `space`, in place, and returns it running the full one.

    Output-side weights become views of the model's own; input-side ones are copied once, transposed.

    Raises: UserError for an unknown family, a model that is nested already, or a space that does not fit it.
    """
    return nest_as(family_of(model.config.model_type), model, space)
