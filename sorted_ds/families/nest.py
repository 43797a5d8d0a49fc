"""`nest(model, space)`, which finds the family of a model by its `model_type`.

In: a Hugging Face model, or a `model_type`. Out: the nested model, or the `Family`. A new kind of architecture is a
file beside `decoder.py` and an entry in `FAMILIES`.
"""

from transformers import PreTrainedModel

from sorted_ds.base.errors import UserError
from sorted_ds.families.decoder import DECODERS
from sorted_ds.nested.family import Family
from sorted_ds.nested.nest import NestedModel, nest_as
from sorted_ds.space import SubNetSpace

FAMILIES: dict[str, Family] = {**DECODERS}
"""All families by Hugging Face's `model_type`."""


def family_of(model_type: str) -> Family:
    """Returns the family of a `model_type`. Raises: UserError for an unknown one; the message lists the known ones."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model family {model_type!r} is not known. Known: {', '.join(FAMILIES)}. "
            "docs/add-a-family.md says how to add one."
        )
    return FAMILIES[model_type]


def nest(model: PreTrainedModel, space: SubNetSpace) -> NestedModel:
    """Returns `model`, changed in place so that it can run every sub-network of `space`. It runs the full one at first.

    Blocks of output-side weights are views of the model's weights. Input-side weights are copied once, transposed.

    Raises: UserError for an unknown family, a model that is nested already, or a space that does not fit the model.
    """
    return nest_as(family_of(model.config.model_type), model, space)
