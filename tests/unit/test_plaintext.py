"""What a container says becomes text that may be shown."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lxc_pool.plaintext import last_lines, plain


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("plain text\n\tindented, ünïcode, 漢字 🙂\n", "plain text\n\tindented, ünïcode, 漢字 🙂\n"),
        ("a\r\nb\r\r\nc\rd\n", "a\nb\nc\nd\n"),
        ("[\x1b[0;32m  OK  \x1b[0m] Started \x1b[0;1;39mcron.service\x1b[0m\n", "[  OK  ] Started cron.service\n"),
        ("\x1b[2J\x1b[1;1Hcleared\x1b[?25l\x1b[38:2::1:2:3mx", "clearedx"),
        ("\x1b]0;a title\x07x\x1b]8;;http://link\x1b\\y\x1bPq#0\x1b\\z", "xyz"),
        ("\x9b31mred\x9d0;title\x9cx\x90q\x1b\\y", "redxy"),
        ("\x1b]52;c;without an end\nthe next line\n", "\nthe next line\n"),
        ("\x1b(B\x1b)0\x1b=\x1b>\x1b7\x1b8\x1bcreset", "reset"),
        ("cut \x1b", "cut "),
        ("cut \x1b[12;", "cut "),
        ("bell\x07 back\x08space nul\0 del\x7f", "bell backspace nul del"),
        ("\x85\x84\x8dx\x0b\x0cy", "xy"),
        ("access \u202edenied\u202c \u2066x\u2069\u200f\u061c\u2028\ufeff", "access denied x"),
        ("\x1b\x1b[31mx", "x"),
        ("\x1b[\x1b[31mx", "x"),
        ("\ud800x", "x"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_is_left_out_and_the_text_stays(said: str, shown: str) -> None:
    assert plain(said) == shown


@given(st.text(alphabet=st.sampled_from("\x1b[]P\\;0m1A \x07\x9b\x9c\x9d\r\n\tx\u202e\x85"), max_size=30) | st.text())
def test_nothing_that_is_no_character_of_a_line_ever_stays(said: str) -> None:
    shown = plain(said)
    assert not [character for character in shown if ord(character) < 32 and character not in "\n\t"]
    assert not {*shown} & {"\x7f", *map(chr, range(0x80, 0xA0)), *map(chr, range(0x202A, 0x202F))}
    assert plain(shown) == shown


@pytest.mark.parametrize("said", ["\x1b" * 200_000, "\x1b]" * 100_000, "\x1b[1" * 70_000, "\r" * 200_000, "\x9b;" * 9])
def test_it_takes_no_time_that_grows_faster_than_the_text(said: str) -> None:
    began = time.process_time()
    plain(said)
    assert time.process_time() - began < 5  # 0.05 s; what is quadratic takes minutes


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [("a\nb\nc\n", 2, "b\nc\n"), ("a\nb", 1, "b"), ("a\n", 5, "a\n"), ("a\n", 0, ""), ("", 3, "")],
)
def test_the_last_lines_are_those_at_the_end(text: str, count: int, expected: str) -> None:
    assert last_lines(text, count) == expected
