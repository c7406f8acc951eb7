"""The signs and names that the reader knows, by what they do; commands without a backslash."""

from __future__ import annotations

from r1jax.rewards.answers import expressions as ex

# Between two sides, and the relation's name in values.
RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in"}
RELATIONS |= {"approx": "~", "sim": "sim", "equiv": "mod", "notin": "notin", "subset": "subset"}
RELATIONS |= {"cong": "cong", "parallel": "parallel", "perp": "perp", "to": "to", "iff": "iff"}
RELATIONS |= {"implies": "implies", "Rightarrow": "implies", "propto": "propto"}

# With arguments. An accent makes a name of its argument; a wrapper says nothing.
FUNCTIONS = set(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc arsinh "
    "arcosh artanh sinh cosh tanh coth ln log lg exp abs "
    "floor ceil max min gcd lcm arg sign det deg dim re im".split()
)
ACCENTS = set(
    "overline bar vec hat tilde widehat overrightarrow overleftrightarrow underline dot overset "
    "widetilde".split()
)
WRAPPERS = set(
    "mathbf boldsymbol bm mathcal mathscr mathfrak pmb displaystyle boxed emph mathop ensuremath "
    "fbox underbrace".split()
)
CONSTANTS = {"pi": ex.PI, "infty": ex.INFINITY, "imath": ex.IMAGINARY, "ldots": ex.symbol("...")}
PLUS_MINUS = {"pm": ex.symbol("\\pm"), "mp": ex.multiply(ex.MINUS_ONE, ex.symbol("\\pm"))}

# Environments.
MATRICES = set("pmatrix bmatrix matrix vmatrix Vmatrix Bmatrix smallmatrix array".split())
ROWS = set("cases aligned align gathered split gather dcases rcases alignedat".split())

# Brackets, with what may close them; what stands between parts; what ends a side.
CLOSERS = {"(": ")]", "[": ")]", "\\{": ("\\}",), "{": "}", "langle": ("rangle",)}
OPENINGS = ("(", "[", "{", "\\{")
CLOSINGS = (")", "]", "}", "\\}")
JOINTS = (",", ";", "listsep", "and", "or", r"\\", "suchthat")
ENDS = {",", ";", "listsep", r"\\", "&", ":", "@", "suchthat", *CLOSINGS, "rangle", "cup", "cap"}
ENDS |= {"setminus", "pmod"}

# Commands that start no factor.
NO_FACTORS = {"cup", "cap", "setminus", "listsep", "rangle", "rfloor", "rceil", "pm", "mp", "pmod"}
NO_FACTORS |= set("over choose mod cdot times neg circ end ldotp quad because therefore".split())

# Beside numbers.
CURRENCIES = {"$", "€", "£", "¥", "₹"}
UNIT_SIGNS = {"/", "^", "1", "2", "3", "-", "{", "}", "cdot"}

# Answers that are one word, however short.
KNOWN_WORDS = set(
    "yes no none odd even true false undefined infinite empty never always not neither both "
    "dne impossible zero one two three four five six seven eight nine ten divergent".split()
)
