"""Where a reading stands: the tokens, the next one, and what is open around it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from r1jax.rewards.answers.text import Token, TooLarge, Unreadable
from r1jax.rewards.answers.vocabulary import ENDS, RELATIONS

MAX_DEPTH = 40


class Cursor:
    """One pass over the tokens; `position` is the next one. The grammar is in `reader.py`."""

    def __init__(self, found: Sequence[Token], trusted: bool) -> None:
        self.tokens = list(found)
        self.position = 0
        self.trusted = trusted  # it is a reference
        self.depth = 0
        self.bars = 0  # open |
        self.in_function = 0  # functions of an angle around it
        self.brackets = 0  # open ones, but for braces
        self._bracket_of: list[int] = []
        self._groups_digits = self._find_groups_of_digits()

    def peek(self, ahead: int = 0) -> Token | None:
        """The next token, or one further ahead; None: there is none."""
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def next_is(self, *names: str, ahead: int = 0) -> bool:
        """Whether it is a sign, command or joint of one of these names."""
        token = self.peek(ahead)
        return (
            token is not None
            and token.text in names
            and token.kind in ("sign", "command", "and", "or")
        )

    def take(self, *names: str) -> bool:
        """Goes past the next token if `next_is` holds; whether it did."""
        if self.next_is(*names):
            self.position += 1
            return True
        return False

    def expect(self, *names: str) -> None:
        """`take`. Raises Unreadable where the next token is another one."""
        if not self.take(*names):
            raise Unreadable(f"{names[0]} is missing")

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Counts how deep the grammar is in itself. Raises TooLarge beyond `MAX_DEPTH`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge("it is nested too deep")
        yield
        self.depth -= 1

    def _find_groups_of_digits(self) -> dict[int, bool]:
        """Index of each bracket (-1: none) -> whether its commas may part thousands.

        `1,234, 5` groups digits, since the commas of the list have a space; `1,2,345` does not.
        Within brackets, `(100,101)` is a pair.
        """
        open_now, spaced, bad = [-1], {-1: False}, {-1: False}
        for index, token in enumerate(self.tokens):
            self._bracket_of.append(open_now[-1])
            if token.kind == "sign" and token.text in ("(", "[", "\\{", "{"):
                open_now.append(index)
                spaced[index] = bad[index] = False
            elif (
                token.kind == "sign" and token.text in (")", "]", "\\}", "}") and len(open_now) > 1
            ):
                open_now.pop()
            elif token.text == "," and 0 < index < len(self.tokens) - 1:
                before, after = self.tokens[index - 1], self.tokens[index + 1]
                if after.space:
                    spaced[open_now[-1]] = True
                elif not (before.kind == "number" and re.match(r"[0-9]{3}(?![0-9])", after.text)):
                    bad[open_now[-1]] = True
        return {
            index: not bad[index] and (spaced[index] or index < 0 or self.tokens[index].text == "{")
            for index in spaced
        }

    def commas_may_part_thousands(self, index: int) -> bool:
        """Whether a comma behind this token may: it depends on the others within its brackets."""
        bracket = self._bracket_of[index] if index < len(self._bracket_of) else -1
        return self._groups_digits.get(bracket, False)

    def ends_side(self, index: int) -> bool:
        """Whether a side ends before this token."""
        token = self.tokens[index]
        return token.kind in ("end", "and", "or") or token.text in ENDS or token.text in RELATIONS

    def next_is_degree(self) -> bool:
        r"""Whether `^\circ` or `^{\circ}` comes next."""
        return self.next_is("^") and (
            self.next_is("circ", ahead=1)
            or (self.next_is("{", ahead=1) and self.next_is("circ", ahead=2))
        )

    def skip_degree(self) -> None:
        """Goes past a sign of degrees."""
        self.position += 1
        braces = self.take("{")
        self.expect("circ")
        if braces:
            self.expect("}")

    def remove(self, ahead: int) -> None:
        """Takes a token away."""
        del self.tokens[self.position + ahead]
        del self._bracket_of[self.position + ahead]

    def split_letters(self, token: Token) -> None:
        """Takes a run of letters apart: its first one, and the rest as a token of its own."""
        self.tokens[self.position] = Token("rest", token.text[0], token.space)
        self.tokens.insert(self.position + 1, Token("rest", token.text[1:]))
        self._bracket_of.insert(self.position, self._bracket_of[self.position])
