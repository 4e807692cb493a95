"""How the programs are fitted to a kernel's struct layouts."""

from __future__ import annotations

import pytest

from bpf.btf import BTFError
from bpf.loader import glance_flags


def test_a_glance_is_whole_words() -> None:
    assert glance_flags([44, 280, 132]) == ["-DTB_GLANCE_FIRST=40", "-DTB_GLANCE_SIZE=248"]


def test_a_glance_that_the_stack_has_no_room_for_is_refused() -> None:
    with pytest.raises(BTFError, match="504 bytes apart"):
        glance_flags([40, 280, 536])
