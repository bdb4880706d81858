"""The one refusal of `strict=True`: something would be left out."""


def left_out_error(found: str, *, argument: str = "strict") -> ValueError:
    """The error to raise where `strict` meets something that is left out.

    Args:
        found: what is left out, without a full stop.
        argument: the argument or flag as the caller knows it.
    """
    advice = "leave the flag out" if argument.startswith("--") else "pass strict=None"
    return ValueError(
        f"`{argument}` allows nothing to be left out, got: {found}. Remove or convert these, or {advice}."
    )
