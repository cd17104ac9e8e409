"""Messages of the networks, as whoever types a command reads them."""

import pytest

from utils.system.errors import UserError, as_user_error


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (
            "leave `ksize=3557`, `num_classes=4` out",
            "a.pth: leave --ksize 3557, --num-classes 4 out",
        ),
        ("`legacy=True`: leave it out", "a.pth: --legacy: leave it out"),
        ("ksize=3.pth: no `classes`, no norm=2", "a.pth: ksize=3.pth: no `classes`, no norm=2"),
    ],
)
def test_arguments_become_flags(said, read):
    with pytest.raises(UserError) as error, as_user_error("a.pth: "):
        raise ValueError(said)
    assert str(error.value) == read
