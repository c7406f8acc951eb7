r"""Reads an answer (LaTeX, plain text or Unicode) into one value: a recursive descent, no eval.

From the outside in: a listing of parts; a part is a chain of sides with relations between them; a
side is a set operation on sums; then products, powers and what a number or bracket starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from r1jax.rewards.answers import expressions as ex
from r1jax.rewards.answers import sets, units
from r1jax.rewards.answers.arithmetic import (
    Node,
    added,
    application,
    apply,
    as_expr,
    determinant,
    letter_symbol,
    matrix_power,
    multiplied,
    negated,
    rounded,
)
from r1jax.rewards.answers.expressions import Expr
from r1jax.rewards.answers.forms import (
    both_signs,
    chain,
    is_set,
    listing,
    set_of,
    set_operation,
)
from r1jax.rewards.answers.text import (
    LETTER_UNITS,
    MAX_DIGITS,
    Token,
    TooLarge,
    Unreadable,
    tidy,
    tokens,
)
from r1jax.rewards.answers.values import (
    Based,
    Colon,
    Either,
    Group,
    Labelled,
    Listing,
    Matrix,
    Operation,
    Relation,
    Residue,
    Scalar,
    Value,
    Words,
)

MAX_DEPTH = 40

_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in"}
_RELATIONS |= {"approx": "~", "sim": "sim", "equiv": "mod", "notin": "notin", "subset": "subset"}
_RELATIONS |= {"cong": "cong", "parallel": "parallel", "perp": "perp", "to": "to", "iff": "iff"}
_RELATIONS |= {"implies": "implies", "Rightarrow": "implies", "propto": "propto"}
_FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc arsinh "
    "arcosh artanh sinh cosh tanh coth ln log lg exp abs "
    "floor ceil max min gcd lcm arg sign det deg dim re im".split()
)
_ACCENTS = set(
    "overline bar vec hat tilde widehat overrightarrow overleftrightarrow underline dot overset "
    "widetilde".split()
)
_WRAPPERS = set(
    "mathbf boldsymbol bm mathcal mathscr mathfrak pmb displaystyle boxed emph mathop ensuremath "
    "fbox underbrace".split()
)
_CURRENCIES = {"$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹"}
_MATRICES = set("pmatrix bmatrix matrix vmatrix Vmatrix Bmatrix smallmatrix array".split())
_ROWS = set("cases aligned align gathered split gather dcases rcases alignedat".split())
_CLOSERS = {"(": ")]", "[": ")]", "\\{": ("\\}",), "{": "}", "langle": ("rangle",)}


@lru_cache(maxsize=512)
def read(text: str, trusted: bool = False) -> Value:
    """The value that a text is.

    Args:
      trusted: the text is a reference: any words behind a number are taken for its unit.

    Raises:
      Unreadable: it is none, and no words either.
      TooLarge: it is beyond the bounds.
    """
    text = tidy(text)
    if not text:
        raise Unreadable("it is empty")
    if re.fullmatch(r"[+-]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?", text):
        text = text.replace(" ", "")
    found: list[Token] = []
    try:
        found = tokens(text)
        return _Reader(found, trusted).whole()
    except TooLarge:
        raise
    except ZeroDivisionError:
        raise TooLarge("a division by zero") from None
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:
        words = _as_words(found) if found else None
        if words is None:
            raise Unreadable(str(error) or "it has no value") from None
        return words


def _as_words(found: Sequence[Token]) -> Words | None:
    """The text of tokens some of which are words."""
    if not any(
        each.kind == "text"
        or (each.kind == "letters" and len(each.text) > 2)
        or (each.text == "." and index)
        for index, each in enumerate(found)
    ) and not all(each.kind == "number" for each in found):
        return None
    joined = "".join(" " * each.space + each.text for each in found).replace("$", "")
    return Words(" ".join(joined.split()))


class _Reader:
    """One pass over the tokens; `position` is the next one."""

    def __init__(self, found: Sequence[Token], trusted: bool) -> None:
        self.tokens = list(found)
        self.position = 0
        self.trusted = trusted
        self.depth = 0
        self.bars = 0  # open |
        self.in_function = 0
        self.brackets = 0
        self.groups_digits = self._groups_digits()

    # -- tokens

    def peek(self, ahead: int = 0) -> Token | None:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def next_is(self, *names: str, ahead: int = 0) -> bool:
        token = self.peek(ahead)
        return (
            token is not None
            and token.text in names
            and token.kind in ("sign", "command", "and", "or")
        )

    def take(self, *names: str) -> bool:
        if self.next_is(*names):
            self.position += 1
            return True
        return False

    def expect(self, *names: str) -> None:
        if not self.take(*names):
            raise Unreadable(f"{names[0]} is missing")

    @contextmanager
    def nested(self) -> Iterator[None]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge("it is nested too deep")
        yield
        self.depth -= 1

    def _groups_digits(self) -> dict[int, bool]:
        """Index of each bracket (-1: none) -> whether its commas may part thousands.

        `1,234, 5` groups digits, since the commas of the list have a space; `1,2,345` does not.
        Within brackets, `(100,101)` is a pair.
        """
        open_now, spaced, bad = [-1], {-1: False}, {-1: False}
        self._bracket_of: list[int] = []
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

    # -- listings

    def whole(self) -> Value:
        if self.next_is("="):
            raise Unreadable("it starts with =")
        items, joints = self.items(())
        if self.position < len(self.tokens):
            raise Unreadable(f"{self.tokens[self.position].text!r} is not understood")
        value = listing(*both_signs(items, joints))
        return _loose_reading(self.tokens, value)

    def items(self, closers: Sequence[str]) -> tuple[list[Value], list[str]]:
        """Parts up to a closing sign, and what stands between them."""
        items: list[Value] = []
        joints: list[str] = []
        while self.peek() is not None and not self.next_is(*closers):
            if self.next_is(*_JOINTS):
                joint = self.tokens[self.position].text
                self.position += 1
                if len(joints) == len(items):  # `2, and 3`
                    if items and joint in (",", ";") and joints[-1] in (",", ";"):
                        raise Unreadable("nothing between two commas")
                    if not items and joint not in ("and", "or"):
                        raise Unreadable(f"{joint} without an answer before it")
                    if joints:
                        joints[-1] = joint if joint in ("and", "or") else joints[-1]
                else:
                    joints.append(joint)
                continue
            if items and len(joints) < len(items):
                raise Unreadable(f"{self.tokens[self.position].text!r} is not understood")
            items.append(self.part())
        if not items and not closers:
            raise Unreadable("it is empty")
        return items, joints

    # -- parts

    def part(self) -> Value:
        """A chain of sides with relations between them."""
        start = self.position
        self.take("approx")
        if self.next_is("neg"):
            raise Unreadable("a negation")
        sides = [self.side()]
        spans = [(start, self.position)]
        signs: list[str] = []
        while (token := self.peek()) is not None and token.kind in ("sign", "command"):
            sign = _RELATIONS.get(token.text)
            if sign is None:
                break
            self.position += 1
            if sign in ("<", ">") and self.take("="):
                sign += "="
            at = self.position
            signs.append(sign)
            sides.append(self.side())
            spans.append((at, self.position))
        modulus = self.modulus()
        if modulus is not None:
            if not signs:
                return Residue(sides[0], modulus)
            sides = [sides[0], Residue(sides[-1], modulus)]
            signs, spans = ["="], [spans[0], spans[-1]]
        if not signs:
            return sides[0]
        return chain(sides, signs, [self.name(*span) for span in spans])

    def modulus(self) -> Expr | None:
        if self.take("pmod"):
            return as_expr(self.argument())
        bracket = self.next_is("(") and self.next_is("mod", ahead=1)
        if bracket:
            self.position += 1
        if self.take("mod"):
            modulus = as_expr(self.sum())
            if bracket:
                self.expect(")")
            return modulus
        return None

    def name(self, start: int, end: int) -> tuple[str, bool] | None:
        """(label, droppable in a reference) if the tokens are a name rather than an expression."""
        span = [each for each in self.tokens[start:end] if each.text not in ("{", "}")]
        spelling = "".join(each.text for each in span)
        if re.fullmatch(r"[A-Za-z]'*\([0-9.,-]+\)", spelling):
            return spelling, True  # `f(2)`
        if not span or re.search(r"(?<![_0-9])[0-9](?!\w*_)", re.sub(r"_[0-9]+", "", spelling)):
            return None
        if (
            re.fullmatch(r"[A-Za-z]'*\([A-Za-z](,[A-Za-z])*\)", spelling)
            and not spelling[2:-1].isupper()
        ):
            return re.split(r"\(", spelling)[0] + "()", True
        letters = [each for each in span if each.kind in ("letters", "rest")]
        if any(each.kind == "text" for each in span):
            return spelling.casefold(), True
        if any(each.text == "^" for each in span) or re.fullmatch(r"\|[a-z]\|", spelling):
            return None  # an equation that could be solved
        if any(each.text in ("+", "-", "cdot", "*", "times") for each in span):
            single = all(len(each.text) == 1 for each in letters)
            distinct = {each.text for each in letters} - {"e", "i"}
            return (spelling, False) if single and len(distinct) > 1 else None
        if any(each.text in _FUNCTIONS or each.text in ("sqrt", "infty") for each in span):
            return (spelling, True) if span[0].text == "det" else None
        body = re.sub(r"_(\{?\w+\}?)", "", spelling)
        if re.fullmatch(r"(?:[A-Za-z]|[a-z]{3,})'*", body) or spelling.startswith("("):
            return spelling, True
        if body.isalpha() and body.islower() and len(letters) == len(span):
            return spelling, False  # `xy = 6` is an equation
        return spelling, True  # `AB`, `P(A)`, `|AB|`, `\angle ABC`

    # -- sides

    def side(self) -> Value:
        value = self.words()
        if value is not None:
            return value
        value = self.based()
        if value is not None:
            return value
        value = self.set_term()
        while (token := self.peek()) is not None and token.kind in ("command", "letters"):
            name = "cup" if token.text == "U" and is_set(value) and token.space else token.text
            if name not in ("cup", "cap", "setminus"):
                break
            self.position += 1
            parts = [value, self.set_term()]
            while self.take(name):  # all at once: each union sorts
                parts.append(self.set_term())
            value = set_operation(name, parts)
        if not self.next_is(":", "@"):
            return value
        items = [value]
        clock = True
        while self.take(":", "@"):
            field = self.peek()
            clock &= field is not None and re.fullmatch("[0-5][0-9]", field.text) is not None
            items.append(self.set_term())
        suffix = self.tail_text()
        last = items[-1]
        if not suffix and isinstance(last, Scalar) and last.unit in ((("pm", 1),), (("am", 1),)):
            suffix = last.unit[0][0]
            items[-1] = replace(last, unit=())
        return Colon(tuple(items), re.sub("[^a-z]", "", suffix.casefold()), clock)

    def words(self) -> Value | None:
        """A side of letters and words only: words, or two or more bare letters."""
        end = self.position
        while end < len(self.tokens):
            token = self.tokens[end]
            plain = token.text in "'-.!?" or (token.text == "(" and end == self.position)
            if token.kind not in ("letters", "text", "rest") and not (
                plain and end > self.position
            ):
                break
            end += 1
        span = self.tokens[self.position : end]
        if not span or not (end == len(self.tokens) or self._ends(end)):
            return None
        if span[-1].text == "!" and len(span) == 2:
            return None
        texts = [each.text for each in span]
        joined = "".join(
            " " * (each.space and index > 0) + each.text for index, each in enumerate(span)
        )
        bare = "".join(texts)
        known = joined.casefold() in _KNOWN_WORDS
        wordy = any(
            each.kind == "text" or (len(each.text) > 3 and units.is_word(each.text))
            for each in span
        )
        if known or wordy:
            self.position = end
            if re.fullmatch(
                r"(?:the )?(?:set of )?(?:all )?real(?: numbers?|s)", joined.casefold()
            ):
                return sets.REALS
            return Words(joined)
        if len(bare) > 1 and bare.isalpha():
            self.position = end
            product = ex.multiply(*(letter_symbol(each) for each in bare))
            return Scalar(product, letters=bare)
        return None

    def _ends(self, index: int) -> bool:
        """Whether a side ends before this token."""
        token = self.tokens[index]
        return token.kind in ("end", "and", "or") or token.text in _ENDS or token.text in _RELATIONS

    def based(self) -> Value | None:
        r"""`213_5`, `-37_8`, `(213)_5`, `\text{A5}_{11}`."""
        index = self.position
        sign = ""
        if self.next_is("-"):
            sign = "-"
            index += 1
        digits = ""
        bracket = index < len(self.tokens) and self.tokens[index].text in ("(", "{")
        index += bracket
        while index < len(self.tokens) and self.tokens[index].kind in ("number", "letters", "text"):
            digits += self.tokens[index].text
            index += 1
        index += bracket
        rest = [each.text for each in self.tokens[index : index + 4]]
        if not re.fullmatch(r"[0-9A-Za-z]+(\.[0-9]+)?", digits) or rest[:1] != ["_"]:
            return None
        if not any(each.isdigit() for each in digits) or digits[0].islower():
            return None
        base, length = (
            (rest[2], 4) if rest[1:2] == ["{"] and rest[3:] == ["}"] else (rest[1:2] or [""], 2)
        )
        base = base if isinstance(base, str) else base[0]
        end = index + length
        if not base.isdigit() or len(base) > 2 or not (end >= len(self.tokens) or self._ends(end)):
            return None
        self.position = end
        digits = digits.lstrip("0").upper() or "0"
        if int(base) == 10 and digits.isdigit():
            return Scalar(ex.number(int(sign + digits)))
        return Based(sign + digits, int(base))

    def set_term(self) -> Value:
        """A sum with its currency, percent sign or unit."""
        start = self.position
        money = ""
        for at in (0, 1):
            token = self.peek(at)
            if token is not None and token.text in _CURRENCIES and (at == 0 or self.next_is("-")):
                money = token.text
                del self.tokens[self.position + at]
                del self._bracket_of[self.position + at]
                break
        node = self.sum()
        value = node if not isinstance(node, Expr) else Scalar(node)
        if not isinstance(value, Scalar):
            return value
        places, digits = self._precision(start, self.position)
        value = replace(value, places=places, digits=digits)
        if money:
            value = replace(value, unit=((money, 1),))
        tail_at = self.position
        text = self.tail_text()
        if text:
            tail = units.read_tail(text, trusted=self.trusted, one=value.expr.key == "1")
            if tail is None:
                self.position = tail_at
                raise Unreadable(f"{text!r} is no unit")
            if money and tail.unit not in ((), value.unit):
                raise Unreadable("two units")
            unit = tail.unit or value.unit
            expr = ex.multiply(value.expr, ex.number(tail.factor))
            value = Scalar(expr, value.places, value.digits, tail.percent, unit)
        return value

    def _precision(self, start: int, end: int) -> tuple[int | None, int]:
        span = [each for each in self.tokens[start:end] if each.text not in ("-", "+", "approx")]
        if len(span) != 1 or "." not in span[0].text or not span[0].text[-1].isdigit():
            return None, 0
        spelling = span[0].text
        if "e" in spelling.casefold():
            return None, 0
        return len(spelling.partition(".")[2]), len(spelling.replace(".", "").lstrip("0"))

    def tail_text(self) -> str:
        """The words and signs behind a number up to the end of the side."""
        token = self.peek()
        if token is None or not (
            token.kind == "text"
            or (token.kind == "letters" and len(token.text) > 1 and units.is_word(token.text))
            or token.text in ("%", "€", "£", "¥", "₹", "$", "°", "percent")
            or self._degree()
            or (token.text == "(" and (inner := self.peek(1)) is not None and inner.kind == "text")
        ):
            return ""
        if token.kind == "letters" and not token.space and units.unit_name(token.text) is None:
            return ""
        pieces: list[str] = []
        depth = 0
        while (token := self.peek()) is not None and (depth or not self._ends_tail(token)):
            depth += (token.text == "{") - (token.text == "}")
            if self._degree():
                self._skip_degree()
                pieces.append(" deg")
                continue
            pieces.append(" " * (token.space or token.kind == "text") + token.text)
            self.position += 1
        return "".join(pieces).strip()

    def _ends_tail(self, token: Token) -> bool:
        if token.kind in ("and", "or", "end"):
            return True
        if token.text in (")",) and not self.brackets:
            return False
        return token.text in _ENDS or token.text in _RELATIONS and token.text != "in"

    def _degree(self) -> bool:
        return self.next_is("^") and (
            self.next_is("circ", ahead=1)
            or (self.next_is("{", ahead=1) and self.next_is("circ", ahead=2))
        )

    # -- arithmetic

    def sum(self) -> Node:
        with self.nested():
            terms: list[Node] = []
            while not terms or self.next_is("+", "-", "pm", "mp"):
                sign, both = "", ""
                while self.next_is("+", "-", "pm", "mp"):
                    new = self.tokens[self.position].text
                    self.position += 1
                    if new == "+" and (sign or both) or new[-1] in "mp" and both:
                        raise Unreadable("two signs")
                    if new in ("pm", "mp"):
                        both = new
                    elif new == "-":
                        sign = "" if sign else "-"
                term = self.product()
                if sign and not both and terms and is_set(last := terms[-1]):
                    other = Scalar(term) if isinstance(term, Expr) else term
                    terms[-1] = set_operation("setminus", [last, other])
                    continue
                if sign:
                    term = negated(term)
                if both:
                    # A factor that is 1 and -1 in turn at the end of the part.
                    term = ex.multiply(_PLUS_MINUS[both], as_expr(term))
                terms.append(term)
            total = terms[0] if len(terms) == 1 else added(terms)
            if self.take("over"):
                return ex.divide(as_expr(total), as_expr(self.sum()))
            if self.take("choose"):
                return ex.binomial(as_expr(total), as_expr(self.sum()))
            return total

    def product(self) -> Node:
        node = self.factor()
        while (token := self.peek()) is not None:
            if token.text in ("*", "cdot", "times") and token.kind in ("sign", "command"):
                self.position += 1
                node = multiplied(node, self.signed_factor())
            elif token.text == "/" and token.kind == "sign":
                self.position += 1
                divisor = as_expr(self.signed_factor())
                node = multiplied(node, ex.power(divisor, ex.MINUS_ONE))
            elif token.text == "%" and not self._percent_ends():
                self.position += 1
                node = multiplied(node, ex.number(Fraction(1, 100)))
            elif self._starts_factor(token):
                node = self._implicit(node)
            else:
                return node
        return node

    def _percent_ends(self) -> bool:
        return self.position + 1 >= len(self.tokens) or self._ends(self.position + 1)

    def _implicit(self, node: Node) -> Node:
        before = self.tokens[self.position - 1]
        token = self.tokens[self.position]
        if token.kind == "number" and before.kind == "number":
            if not self._mixed_follows():
                raise Unreadable("two numbers without a sign between them")
            whole = self._integer(before)
            fraction = as_expr(self.factor())
            self.expect("/")
            fraction = ex.divide(fraction, as_expr(self.factor()))
            return ex.add(as_expr(node), fraction) if whole is not None else node
        mixed = (
            before.kind == "number"
            and token.text == "frac"
            and self._integer(before) is not None
            and isinstance(node, Expr)
            and node.op == "number"
            and not self.next_is("^", ahead=-2)
        )
        at = self.position
        following = self.factor()
        if (
            mixed
            and isinstance(following, Expr)
            and following.op == "number"
            and following.value > 0
        ):
            return ex.add(as_expr(node), following)
        if isinstance(node, Expr) and token.text == "(" and before.kind in ("letters", "rest"):
            if before.text.isupper() and isinstance(following, Group) and node.op == "symbol":
                if self.peek() is None or self._ends(self.position):  # a point `P(1, 2)`
                    return Labelled(before.text, following, True, Relation((), ("listing",)))
            name = application(before.text, following)
            if name:
                factors = node.args if node.op == "*" else (node,)
                others = [each for each in factors if each.key != before.text]
                return ex.multiply(*others, ex.symbol(name))
            if not isinstance(following, Expr | Scalar | Matrix):  # `P(X = 5)`
                inner = "".join(each.text for each in self.tokens[at : self.position])
                return ex.symbol(f"{node.key}{inner}")
        return multiplied(node, following)

    def _integer(self, token: Token) -> int | None:
        return int(token.text) if token.kind == "number" and token.text.isdigit() else None

    def _mixed_follows(self) -> bool:
        """`1 1/2`: a whole number, then a fraction of whole numbers."""
        spelled = [self.peek(ahead) for ahead in (0, 1, 2)]
        return (
            self.tokens[self.position].space
            and all(each is not None for each in spelled)
            and spelled[1].text == "/"  # type: ignore[union-attr]
            and spelled[0].text.isdigit()  # type: ignore[union-attr]
            and spelled[2].text.isdigit()  # type: ignore[union-attr]
            and int(spelled[0].text) < int(spelled[2].text)  # type: ignore[union-attr]
        )

    def _starts_factor(self, token: Token) -> bool:
        if token.kind == "number" or token.kind in ("begin", "rest"):
            return True
        if token.kind == "letters":
            if token.text == "U" and token.space:
                return False
            before = self.tokens[self.position - 1]
            wordy = len(token.text) > 1 and units.is_word(token.text)
            return not (wordy and (token.space or before.kind == "number" or before.text == "}"))
        if token.kind == "command":
            return token.text not in _NO_FACTORS and token.text not in _RELATIONS
        if token.kind == "sign":
            if token.text == "|":
                return not self.bars
            if token.text == "(":
                inner = self.peek(1)
                return not (inner is not None and (inner.text == "mod" or inner.kind == "text"))
            return token.text in ("{", "[", "\\{")
        return False

    def signed_factor(self) -> Node:
        sign = 1
        while self.next_is("+", "-"):
            sign = -sign if self.tokens[self.position].text == "-" else sign
            self.position += 1
        factor = self.factor()
        return factor if sign > 0 else negated(factor)

    def factor(self) -> Node:
        """What a number, name or bracket starts, with powers, factorials and subscripts."""
        with self.nested():
            node = self.primary()
            while True:
                if self.next_is("!"):
                    count = 0
                    while self.take("!"):
                        count += 1
                    if count > 2:
                        raise TooLarge("a factorial of a factorial")
                    node = ex.factorial(as_expr(node), count)
                elif self._degree():
                    at = self.position
                    self._skip_degree()
                    if self.in_function:
                        node = ex.multiply(as_expr(node), ex.PI, ex.number(Fraction(1, 180)))
                    elif self.peek() is None or self._ends(self.position):
                        self.position = at
                        return node
                elif self.take("^"):
                    node = self._raised(node)
                elif self.next_is("'") and isinstance(node, Expr):
                    self.position += 1
                    node = ex.symbol(node.key + "'")
                elif self.next_is("_"):
                    node = self._subscripted(node)
                else:
                    return node

    def _skip_degree(self) -> None:
        self.position += 1
        braces = self.take("{")
        self.expect("circ")
        if braces:
            self.expect("}")

    def _raised(self, node: Node) -> Node:
        braces = self.next_is("{") and self.next_is("'", ahead=1)
        if braces or self.next_is("'"):
            self.position += braces
            primes = 0
            while self.take("'"):
                primes += 1
            if braces:
                self.expect("}")
            return ex.symbol(as_expr(node).key + "'" * primes)
        if isinstance(node, Matrix):
            return matrix_power(node, self.argument(sign=True))
        exponent = self.argument(sign=True)
        if (
            isinstance(exponent, Expr)
            and exponent.key in ("T", "c", "C")
            and not isinstance(node, Expr)
        ):
            return Operation("^", (node, Scalar(exponent)))
        return ex.power(as_expr(node), as_expr(exponent))

    def _subscripted(self, node: Node) -> Node:
        self.expect("_")
        start = self.position
        if self.take("{"):
            depth = 1
            while depth:
                token = self.peek()
                if token is None:
                    raise Unreadable("a brace is not closed")
                depth += (token.text == "{") - (token.text == "}")
                self.position += 1
        else:
            token = self.peek()
            if token is None:
                raise Unreadable("a subscript is missing")
            if token.kind == "letters" and len(token.text) > 1:
                self._split(token)
            self.position += 1
        inner = "".join(each.text for each in self.tokens[start : self.position])
        expr = as_expr(node)
        if expr.op == "number" or expr.op not in ("symbol", "i", "e"):
            raise Unreadable("a subscript of a number")
        return ex.symbol(f"{expr.key}_{inner.strip('{}')}")

    def _split(self, token: Token) -> None:
        """Takes a run of letters apart: its first one, and the rest as a token of its own."""
        self.tokens[self.position] = Token("rest", token.text[0], token.space)
        self.tokens.insert(self.position + 1, Token("rest", token.text[1:]))
        self._bracket_of.insert(self.position, self._bracket_of[self.position])

    def argument(self, *, sign: bool = False, digit: bool = False) -> Node:
        r"""The argument of a command: a group, or one token; `\frac12` has one digit each."""
        with self.nested():
            token = self.peek()
            if token is None:
                raise Unreadable("an argument is missing")
            if sign and token.text in ("-", "+"):
                self.position += 1
                signed = self.argument()
                return negated(signed) if token.text == "-" else signed
            if token.text == "{" and token.kind == "sign":
                return self.primary()
            if token.kind in ("letters", "rest"):
                if len(token.text) > 1:
                    self._split(token)
                self.position += 1
                return letter_symbol(token.text[0])
            if token.kind == "number" and digit and len(token.text) > 1:
                if token.text[1:] == ".":
                    self.position += 1
                else:
                    self.tokens[self.position] = Token("number", token.text[1:])
                return ex.number(int(token.text[0])) if token.text[0] != "." else self._bad_digit()
            return self.primary()

    def _bad_digit(self) -> Expr:
        raise Unreadable("a fraction with a bare point")

    # -- primaries

    def primary(self) -> Node:
        token = self.peek()
        if token is None:
            raise Unreadable("it ends too early")
        self.position += 1
        if token.kind == "number":
            return self._number(token)
        if token.kind in ("letters", "rest"):
            return self._letters(token)
        if token.kind == "begin":
            return self._environment(token.text)
        if token.kind == "command":
            return self._command(token.text)
        if token.kind == "sign":
            if token.text in _CLOSERS:
                return self._group(token.text)
            if token.text == "|":
                return self._absolute()
        raise Unreadable(f"{token.text!r} is not understood")

    def _number(self, token: Token) -> Expr:
        spelling = token.text
        index = self.position - 1
        if spelling.isdigit() and len(spelling) <= 3 and spelling[0] != "0":
            while (
                self.groups_digits.get(
                    self._bracket_of[index] if index < len(self._bracket_of) else -1, False
                )
                and self.next_is(",")
                and (after := self.peek(1)) is not None
                and after.kind == "number"
                and not after.space
                and re.fullmatch(r"[0-9]{3}(?:\.[0-9]*)?", after.text)
            ):
                spelling += after.text
                self.position += 2
        if len(spelling) > MAX_DIGITS:
            raise TooLarge(f"a number has over {MAX_DIGITS} digits")
        if "." in spelling:
            recurring = self._recurring(spelling)
            if recurring is not None:
                return ex.number(recurring)
        return ex.number(Fraction(spelling.rstrip(".") if spelling[-1] == "." else spelling))

    def _recurring(self, spelling: str) -> Fraction | None:
        r"""`0.\overline{3}`, `0.\dot{3}`, `0.(3)`, `0.333...`."""
        block = ""
        if self.next_is("overline", "dot", "bar"):
            self.position += 1
            texts = []
            braces = self.take("{")
            while (token := self.peek()) is not None and token.kind == "number":
                texts.append(token.text)
                self.position += 1
            if braces:
                self.expect("}")
            block = "".join(texts)
        elif self.next_is("(") and not self.tokens[self.position].space:
            inner, close = self.peek(1), self.peek(2)
            if inner is None or inner.kind != "number" or close is None or close.text != ")":
                return None
            block = inner.text
            self.position += 3
        elif self.next_is("ldots"):
            match = re.search(r"\.[0-9]*?([0-9]{1,6}?)\1{2,}$|\.([0-9]{2,6})\2$", spelling)
            self.position += 1
            if match is None:
                raise Unreadable("a decimal without an end")
            block = match[1] or match[2]
        else:
            return None
        if not block.isdigit():
            raise Unreadable("a recurring decimal without digits")
        whole, _, decimals = spelling.partition(".")
        period = Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(decimals))
        return Fraction(f"{whole or '0'}.{decimals or '0'}") + period

    def _letters(self, token: Token) -> Expr:
        if len(token.text) > 4 and len(re.findall("[aeiou]", token.text)) > 1:
            raise Unreadable(f"the word {token.text}")
        if len(token.text) > 1:
            self.position -= 1
            self._split(token)
            self.position += 1
        letter = token.text[0]
        follower = self.peek()
        if (
            len(token.text) == 1
            and follower is not None
            and follower.kind == "number"
            and not follower.space
            and follower.text.isdigit()
            and letter not in "ei"
        ):
            self.position += 1
            return ex.symbol(f"{letter}_{follower.text}")
        return letter_symbol(letter)

    def _group(self, opening: str) -> Node:
        with self.nested():
            bars, self.bars = self.bars, 0
            inside, self.in_function = self.in_function, self.in_function if opening in "({[" else 0
            self.brackets += opening != "{"
            if opening == "\\{":
                self._mark_condition()
            items, joints = self.items(tuple(_CLOSERS[opening]))
            token = self.peek()
            self.expect(*_CLOSERS[opening])
            self.bars, self.in_function = bars, inside
            self.brackets -= opening != "{"
            closing = token.text if token is not None else ""
            if len(items) > 1 or opening == "\\{":
                items, joints = both_signs(items, joints)
            if opening == "\\{":
                return set_of(items, joints)
            if opening == "langle":
                return Group("()", tuple(items))
            if opening == "{" and len(items) != 1:
                return Group("{}", tuple(items))
            if len(items) == 1:
                if (opening, closing) in (("(", "]"), ("[", ")")):
                    raise Unreadable("brackets of two kinds round one value")
                item = items[0]
                if isinstance(item, Scalar) and not (item.unit or item.percent):
                    return item.expr
                if isinstance(item, Scalar) and item.percent:
                    return ex.multiply(item.expr, ex.number(Fraction(1, 100)))
                return item
            if not items:
                raise Unreadable("empty brackets")
            return Group(opening + closing, tuple(items))

    def _mark_condition(self) -> None:
        r"""The sign between element and condition of `\{x | x > 0\}` gets a name of its own."""
        depth, bars, index = 0, [], self.position
        while index < len(self.tokens) and depth >= 0:
            text = self.tokens[index].text
            depth += (text in _OPENINGS) - (text in _CLOSINGS)
            if depth == 0 and text in ("|", ":"):
                bars.append(index)
            index += 1
        if len(bars) % 2:
            self.tokens[bars[0]] = Token("sign", "suchthat")

    def _absolute(self) -> Expr:
        with self.nested():
            self.bars += 1
            node = self.sum()
            self.expect("|")
            self.bars -= 1
            if isinstance(node, Matrix):
                return determinant(node)
            return ex.function("abs", as_expr(node))

    def _command(self, name: str) -> Node:
        with self.nested():
            if name == "frac":
                top = self.argument(sign=False, digit=True)
                bottom = self.argument(digit=True)
                return multiplied(top, ex.power(as_expr(bottom), ex.MINUS_ONE))
            if name in ("sqrt", "cbrt"):
                degree = ex.number(3 if name == "cbrt" else 2)
                if self.take("["):
                    degree = as_expr(self.sum())
                    self.expect("]")
                radicand = as_expr(self.argument() if not self.next_is("(") else self.primary())
                return ex.power(radicand, ex.power(degree, ex.MINUS_ONE))
            if name == "binom":
                return ex.binomial(
                    as_expr(self.argument(digit=True)), as_expr(self.argument(digit=True))
                )
            if name in _CONSTANTS:
                return _CONSTANTS[name]
            if name in _FUNCTIONS:
                return self._function(name)
            if name in ("lfloor", "lceil"):
                inner = as_expr(self.sum())
                self.expect("rfloor" if name == "lfloor" else "rceil")
                return rounded("floor" if name == "lfloor" else "ceil", inner)
            if name == "langle":
                return self._group("langle")
            if name == "mathbb":
                letter = as_expr(self.argument()).key
                return sets.REALS if letter == "R" else ex.symbol(f"set {letter}")
            if name == "emptyset":
                return sets.EMPTY
            if name in _WRAPPERS:
                return self.argument()
            if name in _ACCENTS:
                inner = as_expr(self.argument())
                if name == "underline" and inner.op == "number":
                    return inner
                return ex.symbol(f"{name} {inner.key}")
            if name in ("angle", "triangle"):
                letters = []
                while (token := self.peek()) is not None and token.kind in ("letters", "rest"):
                    letters.append(token.text)
                    self.position += 1
                return ex.symbol(f"{name} {''.join(letters)}")
            if name in _NO_FACTORS or name in _RELATIONS:
                raise Unreadable(f"\\{name} is out of place")
            return ex.symbol(f"\\{name}")

    def _function(self, name: str) -> Expr:
        with self.nested():
            exponent: Expr | None = None
            base: Expr | None = None
            for _ in range(2):
                if self.take("^"):
                    exponent = as_expr(self.argument(sign=True))
                elif self.take("_"):
                    base = as_expr(self.argument())
            self.in_function += name not in ("ln", "log", "exp")
            args = self._arguments()
            self.in_function -= name not in ("ln", "log", "exp")
            inverse = ("ar" if name.endswith("h") else "arc") + name
            if exponent is not None and exponent.key == "-1" and inverse in _FUNCTIONS:
                return ex.function(inverse, *args)
            value = apply(name, args, base)
            return value if exponent is None else ex.power(value, exponent)

    def _arguments(self) -> list[Expr]:
        r"""`(x)`, `{x}`, or the product that follows: `\sin 5x \cos x` is `\sin(5x) \cos(x)`."""
        if self.next_is("(", "{", "["):
            node = self.primary()
            if isinstance(node, Group):
                return [as_expr(each) for each in node.items]
            if not self._degree():
                return [as_expr(node)]
            self._skip_degree()
            return [ex.multiply(as_expr(node), ex.PI, ex.number(Fraction(1, 180)))]
        negative = self.take("-")
        node = self.factor()
        while (token := self.peek()) is not None and (
            (self._starts_factor(token) and token.text not in _FUNCTIONS and token.text != "(")
            or token.text == "/"
        ):
            if self.take("/"):
                node = ex.divide(as_expr(node), as_expr(self.factor()))
            else:
                node = self._implicit(node)
        return [ex.negative(as_expr(node)) if negative else as_expr(node)]

    def _environment(self, name: str) -> Node:
        with self.nested():
            if name.rstrip("*") not in _MATRICES | _ROWS:
                raise Unreadable(f"an environment {name}")
            if name in ("array", "alignedat"):
                self._skip_columns()
            rows: list[list[Value]] = [[]]
            bars, self.bars = self.bars, 0
            while not self.next_is_end(name):
                if self.take(r"\\"):
                    rows.append([])
                elif self.take("&"):
                    if not rows[-1]:
                        rows[-1].append(Scalar(ex.symbol("")))
                elif self.take(",", ";", "or", "and", "listsep") and name.rstrip("*") in _ROWS:
                    continue
                else:
                    rows[-1].append(self.part())
            self.position += 1
            self.bars = bars
            kept = [tuple(row) for row in rows if row]
            if not kept:
                raise Unreadable("an empty environment")
            if name.rstrip("*") in _ROWS:
                cells = [row[0] if len(row) == 1 else Operation("case", row) for row in kept]
                return listing(cells, ["and"] * (len(cells) - 1))
            if len({len(row) for row in kept}) > 1:
                raise Unreadable("a matrix with rows of several lengths")
            matrix = Matrix(tuple(kept))
            return determinant(matrix) if name == "vmatrix" else matrix

    def next_is_end(self, name: str) -> bool:
        token = self.peek()
        if token is None:
            raise Unreadable(f"an environment {name} without an end")
        return token.kind == "end" and token.text == name

    def _skip_columns(self) -> None:
        if self.take("["):
            while self.peek() is not None and not self.take("]"):
                self.position += 1
        if self.take("{"):
            while self.peek() is not None and not self.take("}"):
                self.position += 1


_JOINTS = (",", ";", "listsep", "and", "or", r"\\", "suchthat")
_OPENINGS = ("(", "[", "{", "\\{")
_CLOSINGS = (")", "]", "}", "\\}")
_ENDS = {",", ";", "listsep", r"\\", "&", ":", "@", "suchthat", *_CLOSINGS, "rangle", "cup", "cap"}
_ENDS |= {"setminus", "pmod"}
_NO_FACTORS = {"cup", "cap", "setminus", "listsep", "rangle", "rfloor", "rceil", "pm", "mp", "pmod"}
_NO_FACTORS |= {
    "over",
    "choose",
    "mod",
    "cdot",
    "times",
    "neg",
    "circ",
    "end",
    "ldotp",
    "quad",
    "because",
    "therefore",
}
_CONSTANTS = {"pi": ex.PI, "infty": ex.INFINITY, "imath": ex.IMAGINARY, "ldots": ex.symbol("...")}
_PLUS_MINUS = {"pm": ex.symbol("\\pm"), "mp": ex.multiply(ex.MINUS_ONE, ex.symbol("\\pm"))}
_KNOWN_WORDS = set(
    "yes no none odd even true false undefined infinite empty never always not neither both "
    "dne impossible zero one two three four five six seven eight nine ten divergent".split()
)


def _loose_reading(found: Sequence[Token], value: Value) -> Value:
    """The second reading of `100,200` as a list, and of `5 m` as a quantity."""
    spelled = [each.text for each in found]
    if not isinstance(value, Scalar):
        return value
    numbers = spelled[0::2]
    if len(spelled) > 2 and set(spelled[1::2]) == {","} and all(each.isdigit() for each in numbers):
        items = tuple(Scalar(ex.number(int(each))) for each in numbers)
        return Either(value, Listing(items), loose=False)
    at = next((index for index, each in enumerate(found) if each.kind in ("letters", "rest")), 0)
    tail = found[at:]
    if (
        at
        and tail[0].space
        and all(each.kind == "number" or each.text in "+-./" for each in found[:at])
        and all(each.text in LETTER_UNITS or each.text in _UNIT_SIGNS for each in tail)
    ):
        read = units.read_tail("".join(" " * each.space + each.text for each in tail))
        try:
            number = _Reader(found[:at], False).whole()
        except (Unreadable, ZeroDivisionError):
            return value
        if read is not None and isinstance(number, Scalar) and number.expr.op == "number":
            return Either(value, replace(number, unit=read.unit), loose=True)
    return value


_UNIT_SIGNS = {"/", "^", "1", "2", "3", "-", "{", "}", "cdot"}
