"""What a compiled program does, read from its HLO text: products, bytes, collectives, loops.

XLA's `cost_analysis` counts the body of a loop once, and says nothing about collectives. Here each
operation counts as often as it runs, and each collective belongs to the mesh axes of its groups.
The text is that of `compiled.as_text()`: the program of one device, after optimisation.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from r1jax.models.paged_kernel import PAGE_KERNEL

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class _Shape:
    """An array. `in_hbm` is false for what the compiler keeps in a chip's faster memory."""

    dtype: str
    sizes: tuple[int, ...]
    in_hbm: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        bits = re.match(r"(?:bf|f|s|u|c)(\d+)", self.dtype)  # f32, bf16, s8, u4, f8e4m3fn, c64
        return self.elements * (8 if self.dtype == "pred" else int(bits[1]) if bits else 0) / 8


@dataclass(frozen=True)
class _Instruction:
    """One line of a computation. `shapes` are the leaves of its value; `rest` its attributes."""

    name: str
    opcode: str
    shapes: tuple[_Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    rest: str

    def attribute(self, name: str) -> str:
        """Up to a space or a comma, without a leading %; "" where it is missing."""
        match = re.search(rf"\b{name}=%?([^\s,]+)", self.rest)
        return match[1] if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it names: of a fusion, an asynchronous start, or a call."""
        return tuple(re.findall(r"\b(?:calls|to_apply)=%?([\w.\-]+)", self.rest))


@dataclass
class _Computation:
    """Instructions by name, in order; `root` is the last word."""

    instructions: dict[str, _Instruction] = field(default_factory=dict)
    root: str = ""

    def parameters(self) -> dict[int, str]:
        """Index -> name."""
        return {
            int(each.arguments): each.name
            for each in self.instructions.values()
            if each.opcode == "parameter"
        }

    def operands(self, each: _Instruction) -> list[_Instruction]:
        return [self.instructions[name] for name in each.operands if name in self.instructions]

    def source(self, name: str) -> _Instruction | None:
        """What a value is, behind copies, conversions and bitcasts."""
        each = self.instructions.get(name)
        same = ("bitcast", "copy", "copy-start", "copy-done", "convert", "reshape")
        while each is not None and each.opcode in same and each.operands:
            each = self.instructions.get(each.operands[0])
        return each


@dataclass(frozen=True)
class Module:
    """A program: its computations by name."""

    entry: str
    computations: Mapping[str, _Computation]
    devices: int


@dataclass(frozen=True)
class Operation:
    """Work of one device: what it computes and moves at a time, and how often.

    kernel: its name, of kernels that XLA does not make.
    """

    flops: float
    bytes: float
    times: float
    kernel: str = ""


@dataclass(frozen=True)
class Collective:
    """Devices exchanging data, `times` times.

    bytes: what each device sends at a time, by the cheapest known way (a ring): see `_sent`.
    group: positions in the mesh (flattened) of one group of devices that talk to each other.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: float


@dataclass(frozen=True)
class Cost:
    """What a program does on each device in one call.

    flops: of matrix products, convolutions and the attention kernels that are known; two for a
        multiplication and an addition. bytes: read from and written to HBM.
    unknown: kernels whose products could not be counted.
    """

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    unknown: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        return sum(each.flops * each.times for each in self.operations)

    @property
    def bytes(self) -> float:
        return sum(each.bytes * each.times for each in self.operations)


# --- Reading -------------------------------------------------------------------------------------


def parse(text: str) -> Module:
    """Read the text of an HLO module."""
    header = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
                current = computations[match[2]] = _Computation()
                entry = match[2] if match[1] else entry
        elif _END.match(line):
            current = None
        elif (instruction := _instruction(line)) is not None:
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                current.root = instruction.name
    if not entry:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    return Module(entry, computations, int(header[1]) if header else 1)


# Some computations run on another unit of the chip. A kernel's metadata may begin a line with "}}".
_END = re.compile(r'\}(, execution_thread="\w+")?\s*$')
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_BRACKET = re.compile(r'"[^"]*"|[()]')


def _instruction(line: str) -> _Instruction | None:
    line = _COMMENT.sub("", line)
    match = _LINE.match(line)
    if not match:
        return None
    start = match.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    arguments = line[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    shapes = []
    for dtype, sizes, layout in _LEAF.findall(line[start:end]):
        numbers = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        # S(1) and up: vector, scalar and semaphore memory of a TPU.
        shapes.append(_Shape(dtype, numbers, re.search(r"S\([1-9]", layout) is None))
    opcode, rest = line[end:opening].strip(), line[closing + 1 :]
    return _Instruction(match[1], opcode, tuple(shapes), operands, arguments, rest)


def _closing(line: str, opening: int) -> int:
    """The index of the bracket that closes the one at `opening`; quoted text does not count."""
    depth = 0
    for match in _BRACKET.finditer(line, opening):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced brackets in an HLO instruction: {line[:200]}")


# --- Counting ------------------------------------------------------------------------------------


def cost(
    module: Module,
    *,
    unknown_trips: float = 1,
    largest_branch: bool = True,
    scopes: Mapping[str, float] | None = None,
) -> Cost:
    """What a call of the program does on each device.

    Args:
      unknown_trips: turns of loops whose number is not in the text (decoding until all have ended).
      largest_branch: of a conditional, count the branch that does most, else that with the least.
      scopes: where the data decides, by the beginning of the name of a `jax.named_scope`: turns of
        the loop in it, or how often (0 to 1) the conditional in it takes the branch that does most;
        of `PAGE_KERNEL` and `GROUP_KERNEL`: the pages that a call reads.
    """
    counter = _Counter(module, unknown_trips, float(largest_branch), scopes or {})
    return counter.visit(module.computations[module.entry], 1.0)


# Neither computed nor moved: names, and the ends of what has begun elsewhere.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
    *("async-done", "async-update", "call-done", "copy-done", "send-done", "recv-done"),
    *(f"{kind}-done" for kind in COLLECTIVES),
}
_WHOLE = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")


class _Counter:
    def __init__(
        self,
        module: Module,
        unknown_trips: float,
        larger_share: float,
        scopes: Mapping[str, float],
    ) -> None:
        self._module = module
        self._trips, self._larger_share, self._scopes = unknown_trips, larger_share, scopes
        self._operations: list[Operation] = []
        self._collectives: list[Collective] = []
        self._unknown: dict[str, None] = {}

    def visit(self, computation: _Computation, times: float) -> Cost:
        """Counts all of a computation; returns what was counted so far."""
        for each in computation.instructions.values():
            self._count(each, computation, times)
        return Cost(tuple(self._operations), tuple(self._collectives), tuple(self._unknown))

    def _count(self, each: _Instruction, computation: _Computation, times: float) -> None:
        computations = self._module.computations
        if each.opcode in _FREE:
            return
        kind = each.opcode.removesuffix("-start")
        if each.opcode == "while":
            known = self._of_scope(each)
            if known is None:
                known = _trip_count(each, computation, self._module)
            turns = times * (self._trips if known is None else known)
            for name in ("condition", "body"):
                self.visit(computations[each.attribute(name)], turns)
        elif each.opcode == "conditional":
            self._branch(each, times)
        elif each.opcode in ("call", "call-start", "async-start"):
            for name in each.called:
                self.visit(computations[name], times)
        elif kind in COLLECTIVES:
            operands = _operands(each, computation)
            group = _first_group(each.rest, self._module.devices)
            sent = _size(operands) * _sent(kind, len(group))
            if len(group) > 1:
                self._collectives.append(Collective(kind, sent, group, times))
            self._operations.append(Operation(0.0, 2 * _hbm(operands), times))
        elif each.opcode == "send" and "megascale_transfer_type" in each.rest:
            self._between_slices(each, computation, times)
        else:
            name = _kernel_name(each)
            if name.startswith(PAGE_KERNEL):
                pages = self._scopes.get(name, self._scopes.get(PAGE_KERNEL))
                flops, moved = _of_pages(each, computation, pages)
            else:
                flops = self._flops(each, computation)
                moved = _bytes(each, computation, computations)
            if flops or moved:
                kernel = name if _is_kernel(each) else ""
                self._operations.append(Operation(flops, moved, times, kernel))
            if each.opcode == "fusion":  # collectives that were fused with the products beside them
                for name in each.called:
                    self._fused_collectives(computations[name], times)

    def _of_scope(self, each: _Instruction) -> float | None:
        """What was given for the innermost scope of a loop or conditional."""
        path = re.search(r'op_name="(?:[^"]*?/)?([^"/]+)/(?:\w+\(\)/)*(?:while|cond)"', each.rest)
        inside = re.findall(r"\w+", path[1]) if path else ()  # such as vmap(scope)
        known = (n for name, n in self._scopes.items() if any(x.startswith(name) for x in inside))
        return next(known, None)

    def _between_slices(self, each: _Instruction, computation: _Computation, times: float) -> None:
        """The part of a collective that leaves the slice, which goes by way of the host."""
        transfer = re.search(r'_transfer_type="(\w+)"', each.rest)
        slices = re.search(r'_target="\{([\d,]+)\}x\{0:(\d+)\}', each.rest)
        kind = transfer[1].lower().replace("_", "-") if transfer else ""
        if slices is None or kind not in COLLECTIVES:
            return
        count, of_slice = len(slices[1].split(",")), int(slices[2]) + 1
        first = tuple(index * of_slice for index in range(count))
        sent = _size(_operands(each, computation)) * _sent(kind, count)
        self._collectives.append(Collective(kind, sent, first, times))

    def _fused_collectives(self, computation: _Computation, times: float) -> None:
        for each in computation.instructions.values():
            kind = each.opcode.removesuffix("-start")
            if kind in COLLECTIVES and each.opcode not in _FREE:
                self._count(each, computation, times)
            elif each.opcode == "fusion":
                for name in each.called:
                    self._fused_collectives(self._module.computations[name], times)

    def _branch(self, each: _Instruction, times: float) -> None:
        listed = re.search(r"branch_computations=\{([^}]*)\}", each.rest)
        names = re.findall(r"%?([\w.\-]+)", listed[1] if listed else "") or [
            each.attribute(f"{truth}_computation") for truth in ("true", "false")
        ]
        computations = self._module.computations
        given = self._of_scope(each)
        share = self._larger_share if given is None else given
        branches = [self._apart().visit(computations[name], times) for name in names]
        branches.sort(key=lambda branch: (branch.bytes, branch.flops))
        for chosen, part in ((branches[0], 1 - share), (branches[-1], share)):
            if part:
                self._operations += [replace(x, times=x.times * part) for x in chosen.operations]
                self._collectives += [replace(x, times=x.times * part) for x in chosen.collectives]
                self._unknown |= dict.fromkeys(chosen.unknown)

    def _apart(self) -> _Counter:
        return _Counter(self._module, self._trips, self._larger_share, self._scopes)

    def _flops(self, each: _Instruction, computation: _Computation) -> float:
        operands = _operands(each, computation)
        if each.opcode == "dot":
            contracted = re.search(r"\blhs_contracting_dims=\{([\d,]*)\}", each.rest)
            axes = contracted[1].split(",") if contracted and contracted[1] else []
            depth = math.prod(operands[0].sizes[int(axis)] for axis in axes)
            return 2.0 * each.shapes[0].elements * depth
        if each.opcode == "convolution":
            return _convolution_flops(each, operands[0], operands[1])
        if each.opcode == "fusion":
            inner = self._module.computations
            return sum(
                self._flops(instruction, inner[name])
                for name in each.called
                for instruction in inner[name].instructions.values()
            )
        if _is_kernel(each):
            name = _kernel_name(each)
            flops = _kernel_flops(name, operands)
            if flops is None:
                self._unknown[re.sub(r"[.\d]+$", "", name)] = None
            return flops or 0.0
        return 0.0


# Of Pallas on TPU, of Pallas on GPU, of cuDNN's attention.
_KERNEL_CALLS = ("tpu_custom_call", "gpu.triton", "__cudnn$fmha")


def _is_kernel(each: _Instruction) -> bool:
    return each.opcode == "custom-call" and any(name in each.rest for name in _KERNEL_CALLS)


def _kernel_name(each: _Instruction) -> str:
    """The name that a Pallas kernel has in its source, or cuDNN's; of other instructions theirs."""
    if cudnn := re.search(r"__cudnn\$(fmha\w+)", each.rest):
        return cudnn[1]
    path = re.search(r'op_name="(?:[^"]*?/)?([^"/]+)/pallas_call"', each.rest)
    return path[1] if path and "gpu.triton" in each.rest else each.name


def _operands(each: _Instruction, computation: _Computation) -> list[_Shape]:
    return [shape for operand in computation.operands(each) for shape in operand.shapes]


def _sent(kind: str, n: int) -> float:
    """What a device sends, as a multiple of the bytes that it puts in."""
    return {
        "all-gather": n - 1,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }[kind]


def _trip_count(each: _Instruction, computation: _Computation, module: Module) -> int | None:
    """How often a while loop runs, or None where that depends on data.

    From `known_trip_count` where the compiler wrote it; else, as on TPU, from the condition, which
    compares a counter with a constant. Tokens travel to their experts as often as the busiest of
    them needs (`r1jax.models.experts`): as often as if all were equally busy.
    """
    for pattern in (r'turns_if_even_(\d+)\)*/while"', r'known_trip_count\D*?"n":"?(\d+)'):
        if match := re.search(pattern, each.rest):
            return int(match[1])
    bound = _bound(module.computations[each.attribute("condition")], module)
    if bound is None:
        return None
    index, limit = bound
    first = 0
    operand = computation.instructions.get(each.operands[0])
    if operand is not None and operand.opcode == "tuple":
        first = _constant(computation.source(operand.operands[index])) or 0
    step = _step(module.computations[each.attribute("body")], index)
    return max(0, -(-(limit - first) // step))


def _bound(condition: _Computation, module: Module) -> tuple[int, int] | None:
    """(index of the counter in the loop's state, limit), where the condition is counter < limit."""
    compare = condition.instructions[condition.root]
    values = [condition.source(name) for name in compare.operands]
    if compare.opcode == "fusion":  # compared inside: follow the fusion's parameters outwards
        inner = module.computations[compare.called[0]]
        outside = {name: values[i] for i, name in inner.parameters().items()}
        compare = inner.instructions[inner.root]
        values = [outside.get(name) or inner.source(name) for name in compare.operands]
    if compare.opcode != "compare" or compare.attribute("direction") != "LT" or len(values) != 2:
        return None
    counter, limit = values[0], _constant(values[1])
    if counter is None or counter.opcode != "get-tuple-element" or limit is None:
        return None
    return int(counter.attribute("index")), limit


def _constant(each: _Instruction | None) -> int | None:
    if each is None or each.opcode != "constant" or not re.fullmatch(r"-?\d+", each.arguments):
        return None
    return int(each.arguments)


def _step(body: _Computation, index: int) -> int:
    """What a turn adds to the counter; 1 where that cannot be seen."""
    root = body.instructions[body.root]
    tupled = root.opcode == "tuple" and index < len(root.operands)
    added = body.source(root.operands[index]) if tupled else None
    if added is None or added.opcode != "add":
        return 1
    steps = [_constant(body.source(name)) for name in added.operands]
    return max((step for step in steps if step is not None and step > 0), default=1)


# --- Products ------------------------------------------------------------------------------------


def _convolution_flops(each: _Instruction, image: _Shape, kernel: _Shape) -> float:
    """Two for each product of an output, padding and the holes of dilations left out.

    On TPU every matrix product is a convolution; the dimensions of a batch are spatial ones, padded
    and dilated so that each output has one valid product in them.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.rest)
    assert labels is not None, each.rest
    left, right, out = labels.groups()
    groups = int(each.attribute("batch_group_count") or 1)
    batch = image.sizes[left.index("b")] // groups
    flops = 2.0 * batch * kernel.sizes[right.index("i")] * kernel.sizes[right.index("o")]
    for axis in sorted(set(left) - set("bf")):
        number = int(axis)
        flops *= _valid_products(
            inputs=image.sizes[left.index(axis)],
            taps=kernel.sizes[right.index(axis)],
            outputs=each.shapes[0].sizes[out.index(axis)],
            stride=_window(each.rest, "stride", number, 1),
            low=_window(each.rest, "pad", number, 0),
            left_dilation=_window(each.rest, "lhs_dilate", number, 1),
            right_dilation=_window(each.rest, "rhs_dilate", number, 1),
        )
    return flops


def _window(rest: str, name: str, dimension: int, default: int) -> int:
    """One value of `window={size=2x3 pad=0_1x0_0}`, of pads the low one."""
    match = re.search(rf"window=\{{[^}}]*\b{name}=([^\s}}]+)", rest)
    return int(match[1].split("x")[dimension].split("_")[0]) if match else default


def _valid_products(
    *,
    inputs: int,
    taps: int,
    outputs: int,
    stride: int,
    low: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Pairs of an output and a tap of the kernel that meet an input, along one dimension."""
    last = (inputs - 1) * left_dilation
    # Positions repeat with the dilation: look at one period of outputs.
    period = left_dilation // math.gcd(left_dilation, stride)
    total = 0
    for tap in range(taps):
        shift = tap * right_dilation - low
        first = max(0, -(shift // stride))  # the first output whose input is not below 0
        end = min(outputs, (last - shift) // stride + 1)
        for output in range(first, min(end, first + period)):
            if (output * stride + shift) % left_dilation == 0:
                total += (end - 1 - output) // period + 1
    return total


# A grouped product, and the sum of each group's outer products: rows by group, in order, times the
# group's matrix or another array of the rows. The first is XLA's.
_GROUPED = ("ragged-dot-none", "tgmm")

# Products of a Pallas attention kernel for each query and key, as wide as a key and as a value:
# scores; values. Backward: scores, gradient of the queries; of the weights. And: scores, gradient
# of the keys; of the weights, of the values.
_KERNELS = {"splash_mha_fwd": (1, 1), "splash_mha_dq": (2, 1), "splash_mha_dkv": (2, 2)}
# On GPU, of queries [batch, time, heads, head_dim] and values as wide: JAX's kernel, whose gradient
# computes the scores and the gradient of the weights twice, and another one without products; and
# cuDNN's.
_GPU_KERNELS = {"mha_forward": 2, "mha_backward": 7, "mha_preprocess_backward": 0}
_GPU_KERNELS |= {"fmhaSoftmax": 2, "fmhaSoftmaxBackward": 5}
_GPU_BLOCK = 128  # of queries and of keys
# This package's kernel over packed rows, as if a row had one segment: of keys, and of values.
_PACKED_KERNELS = {
    "flash_attention": (1, 1),
    "flash_attention_dq": (2, 1),
    "flash_attention_dkv": (2, 2),
}


def _kernel_flops(name: str, operands: Sequence[_Shape]) -> float | None:
    """Products of a kernel that XLA cannot look into; None where it is not known.

    Of causal splash attention: whole blocks on and below the diagonal. Of grouped products: all
    rows, though those that belong to no group are passed over.
    """
    if name.startswith("ragged-dot-metadata"):
        return 0.0
    arrays = [shape for shape in operands if shape.dtype in ("bf16", "f32") and shape.sizes]
    if name.startswith(_GROUPED):
        rows, other = arrays
        return 2.0 * rows.elements * other.sizes[-1]
    if name in _GPU_KERNELS or name in _PACKED_KERNELS:
        queries, keys = arrays[:2]
        batch, time, heads, width = queries.sizes
        blocks = -(-time // _GPU_BLOCK)
        pairs = 2.0 * batch * heads * time * keys.sizes[1] * (blocks + 1) / (2 * blocks)
        if name in _GPU_KERNELS:
            return pairs * _GPU_KERNELS[name] * width
        of_keys, of_values = _PACKED_KERNELS[name]
        return pairs * (of_keys * width + of_values * arrays[2].sizes[3])
    products = next((n for known, n in _KERNELS.items() if name.startswith(known)), None)
    if products is None:
        return None
    queries, keys, values = arrays[:3]
    # The first operand says which block of keys each block of queries goes to next.
    blocks = max(operands[0].sizes[-2:], default=1)
    pairs = 2.0 * math.prod(queries.sizes[:-1]) * keys.sizes[-2] * (blocks + 1) / (2 * blocks)
    return pairs * (products[0] * keys.sizes[-1] + products[1] * values.sizes[-1])


def _of_pages(
    each: _Instruction, computation: _Computation, pages: float | None
) -> tuple[float, float]:
    """FLOPs and bytes of the kernel that reads so many pages of a cache; default: all of them."""
    operands = _operands(each, computation)
    # Keys and values, or latents: [layers, 1, pages, heads, page, width]. On a GPU the pages that
    # the slots fill follow behind another operand: all of them are read.
    runs = itertools.groupby(operands, lambda shape: len(shape.sizes) == 6)
    pools, *filling = [list(shapes) for of_pages, shapes in runs if of_pages]
    queries = next(shape for shape in operands if len(shape.sizes) == 4)
    read = pools[0].sizes[2] if pages is None else pages
    read += sum(stacks[0].sizes[2] for stacks in filling)
    scores = sum(math.prod(pool.sizes[3:]) for pool in (pools[0], pools[-1]))
    page = sum(math.prod(pool.sizes[3:]) * pool.bytes / pool.elements for pool in pools)
    others = [shape for shape in operands if len(shape.sizes) != 6]
    return 2.0 * queries.sizes[2] * scores * read, page * read + _hbm([*others, *each.shapes])


# --- Bytes ---------------------------------------------------------------------------------------

# These read of their first operand no more than they give.
_SLICES = ("slice", "dynamic-slice", "gather")


def _bytes(
    each: _Instruction, computation: _Computation, computations: Mapping[str, _Computation]
) -> float:
    """Bytes of HBM that an instruction reads and writes."""
    if each.opcode == "custom-call" and any(f'"{name}"' in each.rest for name in _WHOLE):
        return 0.0
    operands = computation.operands(each)
    if each.opcode == "fusion":
        inner = computations[each.called[0]]
        read = sum(
            _read(inner, parameter, _hbm(operands[i].shapes), computations)
            for i, parameter in inner.parameters().items()
            if _in_hbm(operands[i].shapes)
        )
        return read + _written(each, computations)
    if each.opcode == "copy-start":
        # Its value is (target, source, flag).
        return _hbm(each.shapes[:2])
    if each.opcode in _SLICES and operands:
        return _size(each.shapes) * sum(
            _in_hbm(shapes) for shapes in (operands[0].shapes, each.shapes)
        )
    if each.opcode == "dynamic-update-slice":
        return 2 * _hbm(operands[1].shapes)
    if each.opcode == "scatter":
        return 3 * _hbm(operands[-1].shapes)
    return sum(_hbm(operand.shapes) for operand in operands) + _hbm(each.shapes)


def _size(shapes: Sequence[_Shape]) -> float:
    return sum(shape.bytes for shape in shapes)


def _hbm(shapes: Sequence[_Shape]) -> float:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _in_hbm(shapes: Sequence[_Shape]) -> bool:
    return all(shape.in_hbm for shape in shapes)


def _read(
    inner: _Computation, name: str, whole: float, computations: Mapping[str, _Computation]
) -> float:
    """What a fusion reads of an operand of `whole` bytes: slices, where it takes nothing else."""
    taken = 0.0
    for user, used in _real_users(inner, name, computations):
        is_first = user.operands[0] == used
        if user.opcode in _SLICES and is_first:
            taken += _size(user.shapes)
        elif user.opcode == "dynamic-update-slice" and is_first:
            continue  # updated in place
        elif user.opcode == "scatter" and is_first:
            taken += _size(inner.instructions[user.operands[-1]].shapes)
        elif user.opcode == "fusion":
            nested = computations[user.called[0]]
            for i, parameter in nested.parameters().items():
                if user.operands[i] == used:
                    taken += _read(nested, parameter, whole, computations)
        else:
            return whole
    return min(taken, whole)


def _real_users(
    inner: _Computation, name: str, computations: Mapping[str, _Computation]
) -> Iterator[tuple[_Instruction, str]]:
    """Who uses a value behind bitcasts and changes of its tiles, and under which name.

    A TPU7x tiles weights otherwise than its loops read them. A fusion that is nothing but that
    change moves, inside another one, no more than what is then taken of it.
    """
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        passed = user.opcode == "bitcast"
        if user.opcode == "fusion" and user.name != inner.root:
            nested = computations[user.called[0]].instructions.values()
            passed = {each.opcode for each in nested} <= {"parameter", "copy", "bitcast"}
        if passed:
            yield from _real_users(inner, user.name, computations)
        else:
            yield user, name


def _written(each: _Instruction, computations: Mapping[str, _Computation]) -> float:
    """What a fusion writes: only the update, where it updates a part of an array in place."""
    inner = computations[each.called[0]]
    root = inner.instructions[inner.root]
    names = root.operands if root.opcode == "tuple" else (root.name,)
    total = 0.0
    for name, shape in zip(names, each.shapes, strict=False):
        if not shape.in_hbm:
            continue
        value = inner.source(name)
        if value is not None and value.opcode in ("dynamic-update-slice", "scatter"):
            update = value.operands[1 if value.opcode == "dynamic-update-slice" else -1]
            total += _size(inner.instructions[update].shapes)
        elif value is not None and value.opcode == "fusion" and len(value.shapes) == 1:
            total += _written(value, computations)
        else:
            total += shape.bytes
    return total


# --- Groups of devices ---------------------------------------------------------------------------


def _first_group(rest: str, devices: int) -> tuple[int, ...]:
    """One of the groups of devices of a collective, as positions in the flattened mesh.

    Understands the four notations: lists, `[groups,size]<=[dims]T(permutation)`, `mesh[...] {axes}`
    and pairs of source and target, of which the first two that differ are given.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        moving = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if a != b]
        return moving[0] if moving else ()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(x) for x in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        ids = _iota(iota[3], iota[4])
        return tuple(int(x) for x in ids.reshape(int(iota[1]), int(iota[2]))[0])
    if named := re.search(r"replica_groups=@?mesh\[([^\]]*)\](.*?)\s*\{([^}]*)\}", rest):
        return _named_group(*named.groups())
    return tuple(range(devices))


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    sizes = [int(x) for x in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(x) for x in permutation.split(",")]) if permutation else ids


def _named_group(mesh: str, order: str, axes: str) -> tuple[int, ...]:
    """`mesh['a'=4,'b'=2] {'b'}`; an axis may be a part of one, `'a':(2)2`: (size before)size."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    moved = re.search(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    ids = np.arange(math.prod(sizes.values())) if not moved else _iota(moved[1], moved[2])
    ids = ids.reshape(tuple(sizes.values()))
    # The first device of every other axis; of a split axis the part that is named.
    index: list[np.ndarray] = [np.zeros(1, int) for _ in sizes]
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        axis, size = list(sizes).index(name), sizes[name]
        step = size // (int(before) * int(part)) if part else 1
        chosen = np.arange(int(part or size)) * step
        index[axis] = np.unique(np.add.outer(index[axis], chosen))
    return tuple(int(x) for x in ids[np.ix_(*index)].ravel())


def axes_of(group: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of `mesh` (axis -> size, in its order) along which a group's devices differ."""
    positions = np.stack(np.unravel_index(np.asarray(group, int), tuple(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, positions, strict=True) if len(np.unique(row)) > 1)
