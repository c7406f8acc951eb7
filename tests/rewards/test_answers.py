"""Answers as values and their equality, by kinds; expected verdicts by hand."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.rewards import Answered, Outcome, equivalent_key, final_answer, same_answer
from r1jax.rewards.maths import UnreadableAnswer, accuracy, readable_reference

RIGHT = [
    ("5", r"5\,\mathrm{m}"),
    ("12", "12 cm^2"),
    ("3", r"3\ \text{square meters}"),
    ("60", "60 miles per hour"),
    (r"5\text{ m/s}", "5"),
    (r"5 \text{ m/s}", "5 m/s"),
    ("9.8 m/s^2", r"9.8 \text{ m/s}^2"),
    ("9.8", "9.8 m/s²"),
    (r"\$5", "5 dollars"),
    (r"\$5.00", "5"),
    ("5", "€5"),
    (r"80\text{ cents}", "80"),
    ("3000000", "3 million"),
    ("3000000", r"3\text{ million}"),
    ("24", "2 dozen"),
    ("30000", "3万"),
    ("300", "3百"),
    ("2.5 million", "2500000"),
    (r"\$1.2\text{ million}", "1200000"),
    (r"30^\circ", "30"),
    (r"30^\circ", "30 degrees"),
    ("30°", "30"),
    (r"\frac{\pi}{6}", r"\pi/6"),
    (r"\tan 45^\circ", "1"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"\cos(60^{\circ})", "0.5"),
    (r"\{1,2,3\}", "{1,2,3}"),
    (r"\{1,2,3\}", r"\left\{3,2,1\right\}"),
    ("(1,2)", r"\langle 1,2\rangle"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,2],[3,4]]"),
    (r"\begin{pmatrix}1/2\\1\end{pmatrix}", r"\frac12\begin{pmatrix}1\\2\end{pmatrix}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\frac{1}{x-1}", r"-\frac{1}{1-x}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"2\sin x\cos x", r"\sin 2x"),
    (r"\ln(x^2)", r"2\ln x"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\sqrt{x^2}", "|x|"),
    (r"e^{\ln x}", "x"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt n}"),
    ("n!", "n(n-1)!"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    ("2^{n+1}", r"2\cdot 2^n"),
    (r"\sqrt{12}", r"2\sqrt3"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
    (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"),
    (r"\log_2 8", "3"),
    (r"\log 100", "2"),
    (r"\ln e^3", "3"),
    (r"\frac{\ln 8}{\ln 2}", "3"),
    (r"\log_3 5", r"\frac{\ln 5}{\ln 3}"),
    (r"e^{i\pi}", "-1"),
    ("i^2", "-1"),
    (r"\frac{1+i}{2}", r"\frac12+\frac i2"),
    ("|3+4i|", "5"),
    (r"\arctan 1", r"\frac{\pi}{4}"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"{5 \choose 2}", "10"),
    (r"0.\overline{142857}", r"\frac17"),
    (r"0.1\overline{6}", "1/6"),
    ("0.(3)", "1/3"),
    ("0.333...", "1/3"),
    (r"0.1\dot{6}", r"\frac{1}{6}"),
    (r"2.\overline{36}", r"\frac{26}{11}"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("x=5", "5=x"),
    ("f(x)=2x+1", "2x+1"),
    ("2x+1", "f(x)=1+2x"),
    ("y=2x+1", "2x-y+1=0"),
    ("y=2x+1", "y-2x=1"),
    ("x^2+y^2=4", "2x^2+2y^2=8"),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36"),
    ("x=2, y=3", "(2,3)"),
    ("(x,y)=(2,3)", "x=2, y=3"),
    ("x=2, y=3", "(x,y)=(2,3)"),
    ("(2,3)", "x=2,y=3"),
    ("x=1,2", "1,2"),
    ("x=1,2", r"x=2 \text{ or } x=1"),
    ("x_1=1,x_2=2", "x_1=1, x_2=2"),
    ("x_1=1, x_2=2", "1,2"),
    (r"\pm 3", "x=3 or x=-3"),
    (r"x=\pm 3", r"\pm3"),
    (r"x=\pm 3", "3,-3"),
    (r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"),
    (r"\frac{1\pm\sqrt5}{2}", r"\frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}"),
    ("x>3", r"(3,\infty)"),
    ("x>3", "3<x"),
    (r"(3,\infty)", "x>3"),
    (r"x\ge 3", r"[3,\infty)"),
    (r"1<x\le 2", "(1,2]"),
    ("1<x<2", r"x\in(1,2)"),
    ("x<1 or x>2", r"(-\infty,1)\cup(2,\infty)"),
    (r"x<1\text{ or }x>2", r"(-\infty,1) U (2,\infty)"),
    (r"x\neq 3", r"(-\infty,3)\cup(3,\infty)"),
    (r"\mathbb{R}\setminus\{3\}", r"x\ne 3"),
    (r"\mathbb{R}", "all real numbers"),
    (r"\mathbb R", r"(-\infty,\infty)"),
    (r"\emptyset", r"\{\}"),
    (r"\emptyset", r"\text{no solution}"),
    (r"[0,\infty)", r"x\geq0"),
    (r"\{x|x>1\}", r"(1,\infty)"),
    (r"\{x\in\mathbb{R}: x\neq 2\}", r"x\ne2"),
    (r"(0,1)\cup(1,2)", r"(1,2)\cup(0,1)"),
    ("2x>6", "x>3"),
    ("x<5", "5>x"),
    (r"-3\le x\le 3", "[-3,3]"),
    ("[-3,3]", r"|x|\le 3"),
    (r"x\equiv 3\pmod{7}", r"x\equiv 10\pmod 7"),
    (r"x\equiv 3\pmod{7}", r"x \equiv 3 (mod 7)"),
    (r"3 \pmod 7", r"x\equiv 3\pmod 7"),
    ("5:00", r"5\!:\!00"),
    ("05:30", "5:30"),
    ("3:5", "3 : 5"),
    ("3:5", "6:10"),
    ("1:2:3", "2:4:6"),
    (r"4\!:\!51\!:\!06 \text{ p.m.}", "4:51:06 PM"),
    ("8:34 pm", "8:34"),
    ("213_5", "213_{5}"),
    ("213_5", "(213)_5"),
    ("213_5", r"213_{\text{five}}"),
    ("213_5", r"213 \text{ (base 5)}"),
    ("10_{10}", "10"),
    (r"\text{A5}_{11}", "A5_{11}"),
    ("-37_8", "-37_{8}"),
    (r"1\frac12", "3/2"),
    (r"-1\frac12", "-3/2"),
    ("1½", "1.5"),
    ("2 1/3", "7/3"),
    (r"\frac{-3}{4}", r"-\frac34"),
    ("1e-3", "0.001"),
    (r"3.0\times10^8", "300000000"),
    (r"1.5\cdot 10^{-3}", "0.0015"),
    ("6.02×10^23", r"6.02\times10^{23}"),
    ("x²+1", "x^2+1"),
    ("√3/2", r"\frac{\sqrt3}{2}"),
    ("2π", r"2\pi"),
    ("∞", r"\infty"),
    ("（-∞，2]", r"(-\infty,2]"),
    ("≥", r"\ge"),
    ("１，２", "1,2"),
    ("5米", "5"),
    ("答案：12", "12"),
    ("x＝5", "5"),
    ("12 cm", "12厘米"),
    (r"\text{Yes}", "yes"),
    (r"\text{true}", "True"),
    ("Monday", r"\text{Monday.}"),
    (r"\text{(A)}", "A"),
    ("ABC", r"\text{ABC}"),
    ("xy", "x y"),
    ("xy", r"x\cdot y"),
    ("24,000", "24000"),
    ("1,234.5", "1234.5"),
    ("1 000 000", "1000000"),
    ("10{,}000", "10,000"),
    (r"\frac{1}{29,\!322,\!216}", "1/29322216"),
    ("(1,000, 2,000)", "(1000,2000)"),
    (r"\frac{a}{b}", "a/b"),
    (r"\frac1b", "1/b"),
    ("a_1+a_2", "a_2+a_1"),
    (r"\alpha+\beta", r"\beta+\alpha"),
    (r"k\pi, k\in\mathbb{Z}", r"k\pi,k\in\mathbb Z"),
    (r"\vec{a}+\vec b", r"\vec b+\vec a"),
    (r"\overline{AB}", r"\overline{AB}"),
    (r"10\%", "0.1"),
    ("10", r"10\%"),
    (r"12.5\%", "1/8"),
    ("50%", r"\frac12"),
    ("0.56", r"0.56=56\%"),
    (r"\frac{2}{3}", r"\frac{2}{3}\approx 0.667"),
    ("8.24", r"\approx 8.24"),
    ("2/3", "0.666667"),
    (r"\pi", "3.14159265"),
    (r"\sqrt2", "1.41421356"),
    (r"\lfloor x\rfloor", r"\lfloor x \rfloor"),
    (r"\lfloor 3.7\rfloor", "3"),
    (r"\lceil 3.2 \rceil", "4"),
    (r"\max(2,3)", "3"),
    ("exp(2)", "e^2"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt2}"),
    ("3*x^2", "3x^2"),
    ("x^(1/2)", r"\sqrt x"),
    ("(x+1)/2", r"\frac{x+1}{2}"),
    ("ln(2)", r"\ln 2"),
    ("2pi", r"2\pi"),
    ("pi r^2", r"\pi r^2"),
    ("sin(x)", r"\sin x"),
    ("log_2(3)", r"\log_2 3"),
    ("5/2*sqrt(3)", r"\frac{5\sqrt3}{2}"),
    ("-1/2", "-0.5"),
    ("x <= 5", r"x\le5"),
    ("abs(x)", "|x|"),
    (r"\text{The answer is }5", "5"),
    (r"\boxed{5}", "5"),
    ("**5**", "5"),
    ("5.", "5"),
    ("$5$", "5"),
    (r"\(5\)", "5"),
    ("{5}", "5"),
    ("(5)", "5"),
    ("2^{100}-2", "2^{100} - 2"),
    ("2^{4950}", "4^{2475}"),
    ("9^{9^9}", "9^{9^{9}}"),
    (r"\frac{1}{2^{98}}", "2^{-98}"),
    ("100!", "100!"),
    (r"\frac{100!}{98!}", "9900"),
    ("7", r"\underline{7}"),
    ("7", r"\color{red}{7}"),
    ("7", "f(2)=7"),
    ("7", "P(X)=7"),
    ("1/2", r"\nicefrac{1}{2}"),
    (r"5\text{ minutes}", "5 min"),
    ("(1,2)", "P(1,2)"),
    ("(1,2)", r"\{(1,2)\}"),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1) \text{ or } (2,\infty)"),
    (r"2:15\text{ PM}", "2:15 p.m."),
    ("3:4", r"3\text{ to }4"),
    ("5", r"5\ \mathrm{m}\cdot\mathrm{s}^{-1}"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2,1+\sqrt5,1-\sqrt5"),
    ("p=5,q=2;p=7,q=2", "(7,2),(5,2)"),
    ("C. x = 42", "C"),
    (r"\begin{cases}x=1\\y=2\end{cases}", "x=1, y=2"),
    (r"63^{\circ} 45^{\prime}", r"63.75^\circ"),
    (r"x=0, \frac{1\pm\sqrt{5}}{2}", r"0,\frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}"),
    (r"\begin{pmatrix} 3 \\ 8 \end{pmatrix}", r"\begin{pmatrix}3\\8\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    ("3", r"\begin{vmatrix} 2 & 1 \\ 1 & 2 \end{vmatrix} = 3"),
    ("3+2t", "2t+3"),
    (r"\sin^2 t", r"1-\cos^2 t"),
    ("a + b + c", "c+a+b"),
    ("7m", "3m+4m"),
    (r"24,\!000", "24000"),
    ("24000", r"24,\!000"),
    ("1234567", r"1,\! 234,\! 567"),
    (r"\$7,\!250.50", "7250.5"),
    ("(a,b)=(2,5)", "(2,5)"),
    ("(2,5)", "(a,b)=(2,5)"),
    ("D=[0,1)", "[0,1)"),
    ("x=1 or x=-2", "-2, 1"),
    ("n=4,-8,-10", "-10,-8,4"),
    (r"\frac{\pi}{2}", "pi/2"),
    (r"-2\pi", "-2*pi"),
    ("x^3+1", "x**3+1"),
    ("e^{5}", "exp(5)"),
    (r"\sqrt{2}", "√2"),
    ("x^2", "x²"),
    ("0.5", "½"),
    ("12", "１２"),
    ("(1,2)", "（1，2）"),
    ("1,2", "1、2"),
    ("5", "5元"),
    ("12", "12个"),
    ("5", "答案是5"),
    (r"\frac{50}{3}", r"16.\overline{6}"),
    (r"0.\overline{3}", "1/3"),
    (r"\{x \mid x\ge 0\}", r"[0,\infty)"),
    ("[-2,1)", r"\{x \mid -2\le x<1\}"),
    ("3/2", "1 1/2"),
    ("2 3/4", "2.75"),
    ("5", "5 m/s"),
    ("60", "60 km/h"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (r"\emptyset", r"\varnothing"),
    (r"05\!:\!00", "5:00"),
    (r"1-\frac{1}{\mathrm{e}}", r"\frac{e-1}{e}"),
    (r"2007+\frac\pi 2", r"2007+\frac{\pi}{2}"),
    (r"\approx 8.24", "8.24"),
    (r"[-5,1]\cup[3,9]", r"-5\le x\le 1 \text{ or } 3\le x\le 9"),
]

WRONG = [
    (r"5\text{ kg}", "5 g"),
    (r"5\text{ hours}", "5 minutes"),
    (r"90^\circ", "90 radians"),
    (r"\$5", "€5"),
    ("5 km", "5 miles"),
    ("5", "5 hundred"),
    ("5", "5 dozens"),
    ("5", "5 tenths"),
    ("5", "5 percents of x"),
    ("5", "5 wrong"),
    ("5", "5 maybe six"),
    ("5", "5 negative"),
    ("5", "5 factorial"),
    ("5", "5 choose two"),
    ("3", "3 millions"),
    ("7 apples", "7 oranges"),
    ("5 m", "5 cm"),
    ("5 m/s", "5 km/h"),
    (r"12\text{ cm}", r"12\text{ cm}^2"),
    ("ACBD", "ABCD"),
    ("TFTF", "FFTT"),
    ("east", "seat"),
    ("no", "on"),
    ("xy", "yx"),
    ("listen", "silent"),
    ("F, T, F, F", "T, F, F, F"),
    (r"\text{CBAD}", "CABD"),
    ("A+B", "a+b"),
    ("X", "x"),
    ("p", "P"),
    ("x", "x'"),
    ("x_1", "x_2"),
    ("x_1", "x"),
    (r"\alpha", "a"),
    (r"\vec a", "a"),
    ("101_2", "101_3"),
    ("101_2", "101"),
    ("3", "3i"),
    ("3", r"3\text{i}"),
    ("5", "2=1"),
    ("1", "2=1"),
    ("3", r"3\approx 4"),
    ("3", "not 1=2=3"),
    ("3", r"\neg 1=2=3"),
    ("x=5", "w=5"),
    ("5", "x=6"),
    ("x=5, y=6", "x=6, y=5"),
    (r"x=10^{-8}\pi", "0.0"),
    ("1,234", "1, 234"),
    ("x^2+1=0", "x^2+4=0"),
    ("1+1=2", "1+1=3"),
    ("y=2x+1", "y=2x+2"),
    ("y=2x+1", "x=2y+1"),
    ("x^2+y^2=4", "x^2+y^2=5"),
    ("2x+z=1", "1"),
    ("x>3", r"x\ge3"),
    ("x>3", "x<3"),
    ("x>3", "y>3"),
    (r"(3,\infty)", r"[3,\infty)"),
    (r"x\ne3", r"x\ne4"),
    ("(0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    (r"x\equiv1\pmod6", r"x\equiv5\pmod7"),
    (r"x\equiv 1\pmod6", r"x\equiv 2\pmod 6"),
    ("5:00", "5:30"),
    ("5:00", "5"),
    ("8:34 am", "8:34 pm"),
    ("3:5", "5:3"),
    (r"\frac{1}{9^{99}}", "0"),
    (r"\frac{52!}{13!39!}", r"\frac{1}{9^{99}}"),
    ("e^{-50}", "0"),
    ("e^{-50}", "e^{-51}"),
    ("1+e^{-1000}", "1"),
    (r"\pi", "3.14"),
    (r"\pi", "3.1416"),
    (r"\pi", "22/7"),
    (r"\frac13", "0.333"),
    (r"\sqrt2", "1.414"),
    ("72", "72.0000001"),
    ("0.00000001", "0.00000002"),
    (r"10\%", r"10000\%"),
    (r"\sqrt{x^2}", "x"),
    ("|x|", "x"),
    (r"\ln 2", r"\log_{10}2"),
    (r"\tan 90^\circ", "5"),
    ("5", r"\tan 90^\circ"),
    (r"\frac{\ln3}{\ln2}", "987654321"),
    ("n!", "n"),
    ("x^{100}", "x^{101}"),
    (r"\sin x", r"\sin 2x"),
    ("e^x", "e^{-x}"),
    (r"\binom n2", r"\binom n3"),
    (r"\{1,2\}", "(1,2)"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("1,2,3", "1,2"),
    ("1,1,2", "1,2,2"),
    ("(1,2),(3,4)", "(1,2),(4,3)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\mathbb R", r"\mathbb Q"),
    (r"\emptyset", "0"),
    (r"\emptyset", r"\mathbb{R}"),
    ("5t", "5"),
    (r"\frac12ab", r"\frac12"),
    ("4m", "4"),
    ("7h", "7"),
    ("6g", "6"),
    ("2c", "2"),
    ("3L", "3"),
    ("abc", "ab"),
    (r"\frac{1}{7}\triangle ABC", r"\frac17"),
    ("7", "9^{9^9}"),
    ("7", "9!!!!"),
    ("7", r"\binom{10^9}{5\cdot10^8}"),
    ("9^{9^9}", "9^{9^8}"),
    ("2^{4950}", "2^{4951}"),
    ("5", "5x"),
    ("5", "x5"),
    ("12", "1 2"),
    ("12", "1, 2"),
    ("3", "3 or 4"),
    ("3,4", "3"),
    (r"\text{Monday}", "Tuesday"),
    ("f(2)", "f(3)"),
    ("I(0)", "0"),
    ("f(x)", "f(y)"),
    (r"1\frac12", "1/2"),
    (r"0.\overline{3}", "0.3"),
    (r"0.\overline{3}", r"0.\overline{6}"),
    ("x<1 or x>2", "x>1 and x<2"),
    (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)\cup(3,\infty)"),
    (r"[1,2]\cup[3,4]", "[1,4]"),
    ("y_{1}=x(1-x), y_{2}=x+3", "x+3"),
    ("7", "(7]"),
    (r"\$5", r"5\%"),
    (r"50\%", r"50\text{ dollars}"),
    ("(1,2)", "(y,x)=(1,2)"),
    (r"\{1,2\}", r"\{\{1\},\{2\}\}"),
    (r"\sin x", r"\sin(x+10^{-30})"),
    (r"05\!:\!00", r"35\!:\!00"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    (r"\begin{pmatrix} 0 \\ 0 \\ 0 \end{pmatrix}", r"\begin{pmatrix} 0 \\ 7 \\ 0 \end{pmatrix}"),
    (r"\frac{1}{2}ab", r"\frac{1}{2}"),
    (r"\left(\frac{2}{3}\right)^{100}", r"\left(\frac{2}{3}\right)^{99}"),
    (r"\frac{52!}{26!}", r"\frac{53!}{26!}"),
    (r"\frac{1}{2^{60}}", r"\frac{1}{2^{61}}"),
    (r"1-\frac{5}{2^{90}}", r"1-\frac{7}{2^{90}}"),
    ("x^2-2x+10=0", "x^2+5=0"),
    ("213_5", "213_6"),
    ("1101_2", "1101_3"),
    ("3", r"3\text{ million}"),
    ("8", r"8\text{ thousand}"),
    (r"x\ne 3", r"x\ne 4"),
    (r"\frac{\ln 3}{\ln 2}", "987654321"),
    (r"\frac{3^{2020}+1}{2\cdot 3^{2020}}", r"\frac{1}{9^{99}}"),
    (r"\frac{2^{2024}-1}{3^{2023}}", "0.0"),
    (r"x = 10^{-8}\pi", "0.0"),
    (r"\begin{pmatrix}10^{-8}\pi\\1\end{pmatrix}", r"\begin{pmatrix}0.0\\1\end{pmatrix}"),
    (r"x\equiv 1 \pmod{6}", r"x\equiv 5 \pmod{7}"),
]


def rewarded(reference: str, answer: str) -> bool:
    score = accuracy(Answered("?", rf"\boxed{{{answer}}}", reference), {})
    assert score.outcome is not Outcome.VERIFIER_FAILED
    return score.reward == 1.0


@pytest.mark.parametrize(("reference", "answer"), RIGHT)
def test_right(reference: str, answer: str) -> None:
    assert same_answer(reference, answer)


@pytest.mark.parametrize(("reference", "answer"), WRONG)
def test_wrong(reference: str, answer: str) -> None:
    assert not rewarded(reference, answer)


HOSTILE = [
    "9^{9^9}",
    "9!!!!",
    r"\binom{10^9}{5\cdot10^8}",
    "9" * 100_000,
    "(" * 3000 + "1" + ")" * 3000,
    r"\sqrt{" * 1000 + "2" + "}" * 1000,
    "2^" * 1000 + "2",
    "-" * 3000 + "1",
    "x+" * 700 + "x",
    r"e^{e^{e^{100}}}",
    r"\sin(e^{10000})",
    r"(1+x)^{1000000}",
    r"\frac{2^{131000}-1}{3^{80000}}",
    r"\binom{100000}{50000}",
    r"\cup".join(f"({each},{each}.5)" for each in range(200)),
    r"\pm " * 500 + "1",
    r"x^{x^{x^{x^{x}}}}",
    r"\text{" * 500 + "a" + "}" * 500,
    r"(\sqrt{2}+\sqrt{3})^{40000}",
    r"\tan 90^\circ",
    r"\frac{1}{0}",
    "\\" * 3001,
]
READABLE = ["7", r"\sqrt{2}", "x^2+1", "(1,2)", "x=5", "[0,1)", "1,2,3", r"x\equiv 1\pmod{6}"]


@pytest.mark.parametrize("answer", HOSTILE)
def test_a_hostile_answer_is_wrong_at_once(answer: str) -> None:
    before = time.process_time()
    assert not any(rewarded(reference, answer) for reference in READABLE)
    equivalent_key(answer)
    assert time.process_time() - before < 3.0


def test_a_tower_in_the_reference_is_compared_by_its_form() -> None:
    assert rewarded("9^{9^9}", "9^{9^{9}}")
    assert not rewarded("9^{9^9}", "9^{9^8}")
    assert not rewarded("9^{9^9}", "7")


def test_nested_boxes_take_linear_time() -> None:
    before = time.process_time()
    for count in (4000, 40_000):
        assert final_answer(r"\boxed{" * count + "7" + "}" * count) == "7"
    final_answer(r"\boxed{1}\boxed{" * 20_000 + "}" * 20_000)
    assert time.process_time() - before < 3.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"The pairs are \boxed{(1,3)} and \boxed{(3,1)}.", "(1,3), (3,1)"),
        (r"\(\boxed{1}\) or \(\boxed{-2}\).", "1, -2"),
        (r"\boxed{2}, \boxed{3}, and \boxed{5}", "2, 3, 5"),
        (r"$\boxed{k = 45} \quad \text{and} \quad \boxed{n = 2}$", "k = 45, n = 2"),
        (r"\boxed{1} papers and \boxed{2} bins", "1, 2"),
        ("So \\boxed{5}.\n\n**Final Answer**\n\\boxed{5}", "5"),
        ("\\boxed{4}\n\\boxed{5}", "5"),
        (r"<answer>\boxed{1} and \boxed{2}</answer>", "1, 2"),
        (r"\boxed{1} is wrong. \boxed{2}", "2"),
        (r"\boxed{1}、\boxed{2}", "1, 2"),
    ],
)
def test_several_boxes_are_one_answer(completion: str, answer: str) -> None:
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("reference", "readable"),
    [
        ("7", True),
        (r"\text{August}", True),
        ("B", True),
        (r"0.\overline{3}", True),
        (r"\langle 1, 2, 3\rangle", True),
        (r"\begin{cases}1 & x>0\\0 & x\le 0\end{cases}", True),
        (r"\mathbb R", True),
        (r"\frac\pi 2", True),
        ("5+", False),
        ("", False),
        ("$ $", False),
        (r"\frac{1}{0}", False),
    ],
)
def test_readable_reference(reference: str, readable: bool) -> None:
    assert (readable_reference(reference) is None) is readable


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x=5", "5", True),
        (r"\frac{\sqrt2}{2}", r"\frac{\sqrt{2}}{2}", True),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}", True),
        (r"50\%", "0.5", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("x > 3", r"(3, \infty)", True),
        (r"\pm 2", "2, -2", True),
        (r"1+e^{-50}", "1", False),
        ("x^2", "x^3", False),
        ("ACBD", "ABCD", False),
        ("(1,2)", "(2,1)", False),
    ],
)
def test_votes(one: str, other: str, same: bool) -> None:
    assert (equivalent_key(one) == equivalent_key(other)) is same


whole = st.integers(-50, 50)
terms = st.lists(st.tuples(whole.filter(bool), st.integers(0, 4)), min_size=1, max_size=4)


def spelled(polynomial: list[tuple[int, int]], sign: str) -> str:
    return "".join(f"{factor:+}{sign}x^{{{power}}}" for factor, power in polynomial)


@given(terms, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_another_spelling_keeps_a_polynomial_and_another_value_does_not(polynomial, random) -> None:
    shuffled = list(polynomial)
    random.shuffle(shuffled)
    first, second = spelled(polynomial, ""), spelled(shuffled, r"\cdot ")
    assert same_answer(first, second) and same_answer(second, first)
    assert equivalent_key(first) == equivalent_key(second)
    other = [(polynomial[0][0] + random.choice([-1, 1, 7]), polynomial[0][1]), *polynomial[1:]]
    assert not same_answer(
        first, spelled(other, "") if other[0][0] else spelled(other[1:], "") or "0"
    )


@given(st.lists(st.fractions(max_denominator=99), min_size=2, max_size=5, unique=True))
@settings(max_examples=60, deadline=None)
def test_order_counts_in_tuples_and_not_in_sets(values: list[Fraction]) -> None:
    turned = values[1:] + values[:1]
    one, other = (", ".join(map(str, each)) for each in (values, turned))
    assert same_answer(rf"\{{{one}\}}", rf"\{{{other}\}}")
    assert not same_answer(f"({one})", f"({other})")
    assert same_answer(f"({one})", rf"\left( {one} \right)")
    assert not same_answer(rf"\{{{one}\}}", ", ".join(map(str, values[1:])))


@given(st.integers(2, 300), st.integers(2, 300), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_closed_numbers(a: int, b: int, c: int) -> None:
    one = rf"\frac{{{c}}}{{\sqrt{{{a}}}+\sqrt{{{b}}}}}"
    if a != b:
        other = rf"\frac{{{c}(\sqrt{{{a}}}-\sqrt{{{b}}})}}{{{a - b}}}"
        assert same_answer(one, other) and equivalent_key(one) == equivalent_key(other)
    assert not same_answer(one, rf"\frac{{{c}}}{{\sqrt{{{a + 1}}}+\sqrt{{{b}}}}}")
    assert not same_answer(f"e^{{-{a}}}", f"e^{{-{a + 1}}}")


def test_an_unreadable_answer_says_why() -> None:
    with pytest.raises(UnreadableAnswer, match="too deep"):
        same_answer("7", "(" * 100 + "7" + ")" * 100)
