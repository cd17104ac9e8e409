"""Messages of the networks, as whoever types a command reads them."""

import pytest

from models.classifier import ArgumentError
from utils.system.errors import UserError, as_user_error


@pytest.mark.parametrize(
    ("error", "read"),
    [
        (
            ArgumentError("leave `ksize=3557`, `num_classes=4` out", ksize="3557", num_classes=4),
            "a.pth: leave --ksize 3557, --num-classes 4 out",
        ),
        (
            ArgumentError("`legacy=True`: leave it out", legacy=True),
            "a.pth: --legacy: leave it out",
        ),
        (ValueError("`norm=2`"), "a.pth: `norm=2`"),
    ],
)
def test_arguments_become_flags(error, read):
    with pytest.raises(UserError) as caught, as_user_error("a.pth: "):
        raise error
    assert str(caught.value) == read
