"""Whether this machine can compile the passes of the fused tail."""

import pytest

from models.fused.cpu_passes import BuildError, library

needs_compiler = pytest.mark.skipif(
    isinstance(library(), BuildError), reason=f"no compiled passes: {library()}"
)
