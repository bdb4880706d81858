"""Old argument names: they work, and the warning says what to write and until when."""

import inspect
import warnings

import pytest

from lorarecycle.runtime.deprecation import renamed_arguments


@renamed_arguments(colour="paint", size="side")
def draw(paint: str, *, side: int = 1) -> tuple[str, int]:
    return paint, side


def test_old_names_work_and_warn() -> None:
    with pytest.warns(DeprecationWarning, match=r"`colour` is called `paint` since lorarecycle 0.2; .* until 0.3"):
        assert draw(colour="red") == ("red", 1)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="old name works") as warned:
        assert draw(colour="red", size=3) == ("red", 3)  # type: ignore[call-arg]
    assert sorted(str(w.message).split("`")[1] for w in warned) == ["colour", "size"]
    assert {w.filename for w in warned} == {__file__}, "the warning points to the caller"


def test_new_names_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw("red", side=2) == draw(paint="red", side=2) == ("red", 2)
    assert list(inspect.signature(draw).parameters) == ["paint", "side"]


def test_both_names_at_once() -> None:
    with pytest.raises(TypeError, match="`colour` is the old name of `paint`, got both"):
        draw(paint="red", colour="blue")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="paint"), pytest.warns(DeprecationWarning, match="colour"):
        draw("red", colour="blue")  # type: ignore[call-arg]
