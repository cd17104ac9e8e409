"""What is left of a picture once its file is made."""

import gc
import weakref

from matplotlib import pyplot as plt

from utils.system import style


def test_what_a_figure_draws_does_not_wait_for_the_collector():
    """A run draws its curves after each epoch; the collector comes seldom."""
    others = plt.get_fignums()  # of tests before this one
    figure, axes = plt.subplots()
    line = weakref.ref(axes.plot(range(30))[0])
    gc.collect()
    gc.disable()
    try:
        assert line() is not None
        picture = style.png(figure)
        del figure, axes
        assert line() is None
    finally:
        gc.enable()
    assert picture.startswith(b"\x89PNG")
    assert plt.get_fignums() == others
