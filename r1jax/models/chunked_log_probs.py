"""Log-probs and entropies of tokens by activations and an output matrix, in chunks over time.

The logits of a whole batch are the largest array of a language model's train step
(128 x 4096 x 152,000 floats are 319 GB) and nothing needs them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec

from r1jax.objectives.distillation import Comparison, Divergence, compare_logits
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, PyTree

    Temperature = Float[Array, ""] | float

Carry = TypeVar("Carry")

_NO_TOKEN = -1e30  # finite: times a weight of 0 it is 0


class TargetLogProbs(NamedTuple):
    """Of target tokens, float32; the entropy of `chunked_log_probs` carries no gradient.

    most_likely: the most likely token in place of the target, or None.
    comparison: with a teacher's logits, where there is one.
    """

    log_probs: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]
    most_likely: Int[Array, "batch time"] | None
    comparison: Comparison | None = None


class Chunks(NamedTuple):
    """How the logits are computed: those of `chunk` time steps at once.

    layout: how activations are split over devices along ("batch", "time"); None: they are not.
    """

    chunk: int
    layout: Layout | None = None


@struct.dataclass
class TeacherTokens:
    """A teacher's activations at the student's tokens, and its output matrix.

    vocab: tokens that both models have; set where the matrix is cut to the student's.
    """

    hidden: jax.Array  # [batch, time, hidden], or of wanted tokens [n, hidden]
    matrix: jax.Array  # [hidden, vocab]
    divergence: Divergence = struct.field(pytree_node=False)
    temperature: float | None = struct.field(pytree_node=False)
    vocab: int = struct.field(pytree_node=False, default=0)

    def cut_to(self, vocab: int) -> TeacherTokens:
        """As wide as the student's, whose vocabulary has `vocab` rows."""
        width = self.matrix.shape[1]
        matrix = jnp.pad(self.matrix[:, :vocab], ((0, 0), (0, max(0, vocab - width))))
        return replace(self, matrix=matrix, vocab=min(vocab, width))


def chunked_log_probs(
    hidden: Float[Array, "batch time hidden"],
    matrix: Float[Array, "hidden vocab"],
    targets: Int[Array, "batch time"],
    *,
    chunks: Chunks,
    temperature: Temperature = 1.0,
    most_likely: bool = False,
) -> TargetLogProbs:
    """log softmax(hidden @ matrix / temperature)[targets].

    Each chunk's logits are recomputed in the backward pass.

    Args:
      most_likely: return the most likely tokens, too.
    """
    compute = partial(_device_log_probs, chunk=chunks.chunk, most_likely=most_likely)
    return _over_devices(compute, hidden, matrix, (targets,), temperature, chunks.layout)


def wanted_log_probs(
    hidden: Float[Array, "batch time hidden"],
    matrix: Float[Array, "hidden vocab"],
    targets: Int[Array, "batch time"],
    wanted: Bool[Array, "batch time"],
    *,
    chunks: Chunks,
    temperature: Temperature = 1.0,
    teacher: TeacherTokens | None = None,
) -> TargetLogProbs:
    """As `chunked_log_probs` where `wanted`, else 0: a device's wanted tokens come first, and only
    the chunks that hold any are computed, with as many tokens as there are in `chunk` time steps.

    The gradient is that of log-probs and entropy by `hidden` and `matrix`, and of the divergence to
    a teacher; where no gradient of the entropy is asked for, it costs nothing.
    """
    compute = partial(_device_wanted_log_probs, chunk=chunks.chunk)
    per_token = targets, wanted
    return _over_devices(compute, hidden, matrix, per_token, temperature, chunks.layout, teacher)


def _over_devices(
    compute: Callable[..., TargetLogProbs],
    hidden: jax.Array,
    matrix: jax.Array,
    per_token: tuple[jax.Array, ...],
    temperature: Temperature,
    layout: Layout | None,
    teacher: TeacherTokens | None = None,
) -> TargetLogProbs:
    """`compute(hidden, matrix, *per_token, temperature)` of each device's tokens."""
    temperature = jnp.asarray(temperature, jnp.float32)
    # One more argument, where there is a teacher.
    teachers: tuple[TeacherTokens, ...] = ()
    if teacher is not None:
        teachers = (teacher.cut_to(matrix.shape[1]),)
    if layout is None or layout.shards("batch") * layout.shards("time") == 1:
        return compute(hidden, matrix, *per_token, temperature, *teachers)
    batch_time, table = layout.spec(("batch", "time")), dict(layout.rules)
    # Each device computes the log-probs of its tokens. Without this, the compiler sums the matrix's
    # gradient over the devices in every chunk; here it leaves a device once. Axes that split the
    # vocabulary stay the compiler's. But devices that share a row compute its log-probs together,
    # with a part of the vocabulary each: none has to hold the whole matrix and its gradient in
    # float32, 3.5 GiB each of DeepSeek-V3's.
    vocab, parts = matrix.shape[1], layout.shards("time")
    time_axes = table["time"] if parts > 1 else ()
    row_axes = (*table["batch"], *table["time"])
    matrix = jnp.pad(matrix, ((0, 0), (0, -vocab % parts)))
    teachers = tuple(
        replace(each, matrix=jnp.pad(each.matrix, ((0, 0), (0, -vocab % parts))))
        for each in teachers
    )
    first = jnp.arange(parts, dtype=jnp.int32) * (matrix.shape[1] // parts)

    def compute_part(
        hidden: jax.Array,
        matrix: jax.Array,
        per_token: tuple[jax.Array, ...],
        first: jax.Array,
        temperature: jax.Array,
        *teachers: TeacherTokens,
    ) -> TargetLogProbs:
        devices = _Devices(first[0], row_axes, time_axes, vocab)
        return compute(hidden, matrix, *per_token, temperature, *teachers, devices=devices)

    split_vocab = PartitionSpec(None, time_axes), PartitionSpec(time_axes)
    specs: dict[str, PyTree] = {"hidden": batch_time, "matrix": split_vocab[0]}
    of_teachers = [replace(each, **specs) for each in teachers]
    return jax.shard_map(
        compute_part,
        mesh=layout.mesh,
        in_specs=(
            *(batch_time, split_vocab[0], batch_time, split_vocab[1], PartitionSpec()),
            *of_teachers,
        ),
        out_specs=batch_time,
        axis_names={*row_axes},
        check_vma=False,
    )(hidden, matrix, per_token, first, temperature, *teachers)


@struct.dataclass
class _Devices:
    """Over which a batch is split.

    row_axes: mesh axes of all of them. time_axes: of those that share rows, which split the
    vocabulary: each has the part that begins with token id `first`. vocab: size of the whole.
    """

    first: jax.Array
    row_axes: tuple[str, ...] = struct.field(pytree_node=False)
    time_axes: tuple[str, ...] = struct.field(pytree_node=False)
    vocab: int = struct.field(pytree_node=False)


def _device_log_probs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    *,
    chunk: int,
    most_likely: bool,
    devices: _Devices | None = None,
) -> TargetLogProbs:
    batch, time, width = hidden.shape
    chunk = min(chunk, time)
    padded = -(-time // chunk) * chunk
    wide = matrix.astype(jnp.float32)  # so that the chunks' gradients are summed in float32
    hidden = jnp.pad(hidden, ((0, 0), (0, padded - time), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padded - time)))

    @jax.checkpoint
    def compute(hidden: jax.Array, targets: jax.Array) -> TargetLogProbs:
        narrow = wide.astype(matrix.dtype)
        results, _ = _chunk_log_probs(hidden, narrow, targets, temperature, most_likely, devices)
        return results

    if padded == chunk:
        results = compute(hidden, targets)
    else:
        hidden = hidden.reshape(batch, padded // chunk, chunk, width).swapaxes(0, 1)
        targets = targets.reshape(batch, padded // chunk, chunk).swapaxes(0, 1)
        _, results = jax.lax.scan(lambda _, xs: (None, compute(*xs)), None, (hidden, targets))
        results = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, padded), results)
    return jax.tree.map(lambda x: x[:, :time], results)


class _WantedTokens(NamedTuple):
    """Which tokens of a device to compute, and what is needed beside activations and matrix.

    order: index of each wanted token, then of tokens that do not exist. chunks: how many to run.
    """

    order: jax.Array
    chunks: jax.Array
    targets: jax.Array
    temperature: jax.Array
    devices: _Devices | None
    teacher: TeacherTokens | None


def _device_wanted_log_probs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    temperature: jax.Array,
    teacher: TeacherTokens | None = None,
    *,
    chunk: int,
    devices: _Devices | None = None,
) -> TargetLogProbs:
    batch, time, width = hidden.shape
    count, at_once = batch * time, batch * min(chunk, time)
    size = -(-count // at_once) * at_once
    (order,) = jnp.nonzero(wanted.reshape(-1), size=size, fill_value=count)
    chunks = -(-jnp.sum(wanted, dtype=jnp.int32) // at_once)
    if devices is not None:  # which may work on a chunk together
        chunks = jax.lax.pmax(chunks, devices.row_axes)
    if teacher is not None:
        teacher = replace(teacher, hidden=teacher.hidden.reshape(count, -1))
    tokens = _WantedTokens(order, chunks, targets.reshape(-1), temperature, devices, teacher)
    results = _run_wanted(hidden.reshape(count, width), matrix, tokens, at_once)
    return jax.tree.map(lambda x: x.reshape(batch, time), results)


# A loop that ends when the data says so has no gradient of JAX's. This one keeps two numbers of a
# token, and reads a chunk's logits, computed again, once.
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _run_wanted(
    hidden: jax.Array, matrix: jax.Array, tokens: _WantedTokens, at_once: int
) -> TargetLogProbs:
    """Of activations [n, hidden], `at_once` wanted tokens at once: [n]."""
    results, _ = _wanted_chunks(hidden, matrix, tokens, at_once)
    return results


def _wanted_chunks(
    hidden: jax.Array, matrix: jax.Array, tokens: _WantedTokens, at_once: int
) -> tuple[TargetLogProbs, jax.Array]:
    """And of each token the log of the sum of its logits' exponentials."""

    def write(
        part: jax.Array, results: tuple[TargetLogProbs, jax.Array]
    ) -> tuple[TargetLogProbs, jax.Array]:
        teacher = tokens.teacher
        if teacher is not None:
            teacher = replace(teacher, hidden=_rows(teacher.hidden, part)[None])
        values = _chunk_log_probs(
            _rows(hidden, part)[None],
            matrix,
            _rows(tokens.targets, part)[None],
            tokens.temperature,
            most_likely=False,
            devices=tokens.devices,
            teacher=teacher,
        )
        return jax.tree.map(lambda x, y: x.at[part].set(y[0], mode="drop"), results, values)

    zeros = jnp.zeros(len(hidden), jnp.float32)
    comparison = None if tokens.teacher is None else Comparison(zeros, zeros)
    start = TargetLogProbs(zeros, zeros, None, comparison), zeros
    return _for_wanted(write, start, tokens, at_once)


class _Residuals(NamedTuple):
    """Of the forward pass: its arguments, and of each token the log of the sum, and the entropy."""

    hidden: jax.Array
    matrix: jax.Array
    tokens: _WantedTokens
    total: jax.Array
    entropy: jax.Array


def _wanted_forward(
    hidden: CustomVJPPrimal, matrix: CustomVJPPrimal, tokens: _WantedTokens, at_once: int
) -> tuple[TargetLogProbs, _Residuals]:
    plain = tuple(jax.tree.map(lambda leaf: leaf.value, x) for x in (hidden, matrix, tokens))
    results, total = _wanted_chunks(plain[0], plain[1], plain[2], at_once)
    return results, _Residuals(plain[0], plain[1], plain[2], total, results.entropy)


def _wanted_backward(
    at_once: int, residuals: _Residuals, gradient: TargetLogProbs
) -> tuple[jax.Array, jax.Array, None]:
    hidden, matrix, tokens, total, entropy = residuals
    devices, temperature = tokens.devices, tokens.temperature
    by_log_prob = _instantiated(gradient.log_probs)
    by_entropy = by_divergence = None
    if not isinstance(gradient.entropy, SymbolicZero):  # else only shown: it costs nothing
        by_entropy = gradient.entropy
    if gradient.comparison is not None:
        by_divergence = _instantiated(gradient.comparison.divergence)

    def add(part: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def of_part(values: jax.Array) -> jax.Array:
            return _of_all(_rows(values, part)[None], devices)

        rows = of_part(hidden)
        logits = _logits(rows, matrix, temperature, devices)
        d_logits = _logits_gradient(
            logits,
            of_part(tokens.targets) - (0 if devices is None else devices.first),
            of_part(total),
            of_part(by_log_prob),
            None if by_entropy is None else (of_part(by_entropy), of_part(entropy)),
        )
        if tokens.teacher is not None and by_divergence is not None:
            teacher = replace(tokens.teacher, hidden=_rows(tokens.teacher.hidden, part)[None])

            def divergence(logits: jax.Array) -> jax.Array:
                return _comparison(logits, teacher, temperature, devices).divergence

            _, pull_back = jax.vjp(divergence, logits)
            d_logits += pull_back(_rows(by_divergence, part)[None])[0]
        d_rows, d_part = _product_gradients(rows, matrix, d_logits / temperature)
        if devices is not None and devices.time_axes:  # each has summed over its part
            axes = devices.time_axes
            d_rows = jax.lax.psum_scatter(d_rows, axes, scatter_dimension=1, tiled=True)
        d_hidden, d_matrix = totals
        d_rows = d_rows[0].astype(hidden.dtype)
        return d_hidden.at[part].set(d_rows, mode="drop"), d_matrix + d_part

    zeros = jnp.zeros_like(hidden), jnp.zeros(matrix.shape, jnp.float32)
    d_hidden, d_matrix = _for_wanted(add, zeros, tokens, at_once)
    return d_hidden, d_matrix.astype(matrix.dtype), None


def _logits_gradient(
    logits: jax.Array,
    targets: jax.Array,
    total: jax.Array,
    by_log_prob: jax.Array,
    by_entropy: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """The gradient by logits x [batch, time, vocab], in one pass over them.

    With p = exp(x - total), that of a log-prob is [token is the target] - p, and that of an entropy
    H is -p (x - total + H).

    Args:
      targets: index into these logits; another one where another device has the target.
      total: log sum exp of the whole vocabulary's logits.
      by_log_prob: the gradient by each log-prob.
      by_entropy: that by each entropy, and the entropy.
    """
    logs = logits - total[..., None]
    probs = jnp.exp(logs)
    is_target = targets[..., None] == jnp.arange(logits.shape[-1], dtype=targets.dtype)
    gradient = by_log_prob[..., None] * (is_target - probs)
    if by_entropy is None:
        return gradient
    by_entropy_, entropy = by_entropy
    return gradient - by_entropy_[..., None] * probs * (logs + entropy[..., None])


def _instantiated(gradient: jax.Array | SymbolicZero) -> jax.Array:
    if isinstance(gradient, SymbolicZero):
        return jnp.zeros(gradient.shape, gradient.dtype)
    return gradient


_run_wanted.defvjp(_wanted_forward, _wanted_backward, symbolic_zeros=True)


def _for_wanted(
    function: Callable[[jax.Array, Carry], Carry], start: Carry, tokens: _WantedTokens, at_once: int
) -> Carry:
    """`function(indices of wanted tokens, value)` for all chunks that hold any."""

    def advance(carry: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        index, value = carry
        part = jax.lax.dynamic_slice_in_dim(tokens.order, index * at_once, at_once)
        return index + 1, function(part, value)

    # The planner reads there how often to count a loop that ends when the data says so.
    with jax.named_scope(f"turns_if_even_{len(tokens.order) // at_once}"):
        return jax.lax.while_loop(
            lambda carry: carry[0] < tokens.chunks, advance, (jnp.int32(0), start)
        )[1]


def _rows(values: jax.Array, part: jax.Array) -> jax.Array:
    """values[part], and 0 for what does not exist."""
    return jnp.asarray(values).at[part].get(mode="fill", fill_value=0)


def _chunk_log_probs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    most_likely: bool,
    devices: _Devices | None,
    teacher: TeacherTokens | None = None,
) -> tuple[TargetLogProbs, jax.Array]:
    """Of this device's tokens [batch, time], and the log of each one's sum of exponentials."""
    logits = _logits(_of_all(hidden, devices), matrix, temperature, devices)
    if devices is None or not devices.time_axes:
        results, total = _from_logits(logits, targets, most_likely)
    else:
        targets = _of_all(targets, devices)
        results, total = _from_partial_logits(logits, targets, devices, most_likely)
    if teacher is not None:
        comparison = _comparison(logits, teacher, temperature, devices)
        results = results._replace(comparison=comparison)
    return results, total


def _of_all(x: jax.Array, devices: _Devices | None) -> jax.Array:
    """[batch, time, ...] of the tokens of all devices that share this one's rows."""
    if devices is None or not devices.time_axes:
        return x
    return jax.lax.all_gather(x, devices.time_axes, axis=1, tiled=True)


def _logits(
    hidden: jax.Array, matrix: jax.Array, temperature: jax.Array, devices: _Devices | None
) -> jax.Array:
    """[batch, time, vocab] in float32; far below all others, where no token is."""
    logits = _product(hidden, matrix) / temperature
    if devices is None or not devices.time_axes:
        return logits
    ids = devices.first + jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(ids < devices.vocab, logits, _NO_TOKEN)


@jax.custom_vjp
def _product(
    hidden: Float[Array, "batch time hidden"], matrix: Float[Array, "hidden vocab"]
) -> Float[Array, "batch time vocab"]:
    """In float32. Its gradients are products in the dtype of its arguments, as any layer's are: by
    default those of float32 logits would be products in float32, at half the speed or less."""
    return jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)


def _product_forward(
    hidden: jax.Array, matrix: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(hidden, matrix), (hidden, matrix)


def _product_backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    hidden, matrix = residuals
    d_hidden, d_matrix = _product_gradients(hidden, matrix, gradient)
    return d_hidden.astype(hidden.dtype), d_matrix.astype(matrix.dtype)


_product.defvjp(_product_forward, _product_backward)


def _product_gradients(
    hidden: jax.Array, matrix: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of `_product` by its arguments, in float32."""
    gradient = gradient.astype(hidden.dtype)
    d_hidden = jnp.einsum("btv,hv->bth", gradient, matrix, preferred_element_type=jnp.float32)
    d_matrix = jnp.einsum("bth,btv->hv", hidden, gradient, preferred_element_type=jnp.float32)
    return d_hidden, d_matrix


def _comparison(
    logits: jax.Array,
    teacher: TeacherTokens,
    temperature: jax.Array,
    devices: _Devices | None,
) -> Comparison:
    """With the teacher's logits, of this device's tokens.

    Args:
      logits: the student's [batch, time, vocab]; where devices share rows, of the tokens of all of
        them and this device's part of the vocabulary.
    """
    others = _product(_of_all(teacher.hidden, devices), teacher.matrix)
    others = others / (temperature if teacher.temperature is None else teacher.temperature)
    if teacher.temperature is not None:
        logits = logits * (temperature / teacher.temperature)
    axes = () if devices is None else devices.time_axes
    if axes or teacher.vocab < logits.shape[-1]:
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        ids = ids if devices is None or not axes else devices.first + ids
        shared = ids < teacher.vocab
        logits, others = (jnp.where(shared, x, _NO_TOKEN) for x in (logits, others))
    comparison = compare_logits(logits, others, teacher.divergence, axes)
    if devices is None or not axes:
        return comparison
    # Equal on all devices, of which each keeps its tokens'.
    return jax.tree.map(partial(_of_device, devices, logits.shape[-1]), comparison)


def _from_logits(
    logits: jax.Array, targets: jax.Array, most_likely: bool
) -> tuple[TargetLogProbs, jax.Array]:
    """Of logits [batch, time, vocab]; and the log of the sum of their exponentials."""
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    frozen = jax.lax.stop_gradient(logits)
    peak = jnp.max(frozen, axis=-1)
    # Both sums are of one pass.
    weights = jnp.exp(logits - peak[..., None])
    weight = jnp.sum(weights, axis=-1)
    total = jnp.log(weight) + peak
    mean = jnp.sum(jax.lax.stop_gradient(weights) * frozen, axis=-1) / weight
    entropy = jax.lax.stop_gradient(total - mean)
    best = jnp.argmax(frozen, axis=-1).astype(jnp.int32) if most_likely else None
    return TargetLogProbs(target - total, entropy, best), total


def _from_partial_logits(
    logits: jax.Array, targets: jax.Array, devices: _Devices, most_likely: bool
) -> tuple[TargetLogProbs, jax.Array]:
    """As `_from_logits` of all parts' logits, for this device's tokens.

    Args:
      logits: [batch, all devices' time, part of vocab].
      targets: int32 [batch, all devices' time].
    """
    frozen = jax.lax.stop_gradient(logits)
    peaks = jax.lax.pmax(jnp.max(frozen, axis=-1), devices.time_axes)

    def summed(x: jax.Array) -> jax.Array:
        """The sum over the parts, of this device's tokens."""
        return jax.lax.psum_scatter(x, devices.time_axes, scatter_dimension=1, tiled=True)

    local = partial(_of_device, devices, logits.shape[-1])
    weights = jnp.exp(logits - peaks[..., None])
    weight, peak = summed(jnp.sum(weights, axis=-1)), local(peaks)
    index = targets - devices.first
    inside = (index >= 0) & (index < logits.shape[-1])
    index = jnp.clip(index, 0, logits.shape[-1] - 1)
    target = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    target = summed(jnp.where(inside, target, 0))
    total = jnp.log(weight) + peak
    mean = summed(jnp.sum(jax.lax.stop_gradient(weights) * frozen, axis=-1)) / weight
    entropy = jax.lax.stop_gradient(total - mean)
    best = None
    if most_likely:
        # The first of the most likely, as argmax has it.
        ids = devices.first + jnp.arange(logits.shape[-1], dtype=jnp.int32)
        best = ids[jnp.argmax(frozen, axis=-1)]
        best = jnp.where(jnp.max(frozen, axis=-1) == peaks, best, devices.vocab)
        best = local(jax.lax.pmin(best, devices.time_axes))
    return TargetLogProbs(target - total, entropy, best), total


def _of_device(devices: _Devices, part: int, x: jax.Array) -> jax.Array:
    """Of [batch, all devices' time], equal on all of them, this device's tokens.

    part: of the vocabulary, that a device has.
    """
    count, index = x.shape[1] // jax.lax.axis_size(devices.time_axes), devices.first // part
    return jax.lax.dynamic_slice_in_dim(x, index * count, count, axis=1)
