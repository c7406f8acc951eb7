"""Log-probs of a student's tokens, with the divergence to a teacher at each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
from flax import struct

from r1jax.models.chunked_log_probs import TeacherTokens
from r1jax.models.config import Decoder
from r1jax.models.decoder import Routings, TokenRows, forward, unembedding
from r1jax.models.log_probs import log_probs_of_wanted
from r1jax.models.parameters import Params
from r1jax.objectives.distillation import Comparison, Divergence

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    Temperature = Float[Array, ""] | float


@struct.dataclass
class Teacher:
    """A model that another one is compared with, and whose weights are constants.

    params, model: of the same tokens as the student's; rows of the vocabulary beyond the smaller
        one, which stand for no token, take no part in the comparison.
    temperature: of both models' logits in the divergence. None: the student's.
    """

    params: Params
    model: Decoder = struct.field(pytree_node=False)
    divergence: Divergence = struct.field(pytree_node=False)
    temperature: float | None = struct.field(pytree_node=False, default=None)


class DistilledLogProbs(NamedTuple):
    """As `TokenLogProbs`, with a comparison with the teacher: of wanted tokens, else 0."""

    log_probs: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]
    comparison: Comparison
    routings: Routings


def distilled_log_probs(
    params: Params,
    rows: TokenRows,
    model: Decoder,
    teacher: Teacher,
    *,
    wanted: Bool[Array, "batch time"],
    temperature: Temperature = 1.0,
    balance: bool = False,
) -> DistilledLogProbs:
    """As `token_log_probs` of `wanted` tokens, with the divergence to a teacher at each of them.

    Both models read the rows, and a chunk's logits exist twice: there is no array [batch, time,
    vocab]. Beside the student's 6 FLOPs for each weight and token (8 with remat) the teacher takes
    2, and 2 more for those of its output matrix, whose logits the backward pass computes again. In
    memory are its weights, and a chunk of its logits in float32; nothing of it is kept between two
    micro-batches. (Storing its K likeliest tokens takes 8 K bytes a token, and saves time only
    where a row is trained on again.)

    Args:
      balance: as of `forward`.
    """
    output = forward(params, rows, model, balance=balance)
    of_teacher = forward(teacher.params, rows._replace(experts=None), teacher.model)
    read = TeacherTokens(
        jax.lax.stop_gradient(of_teacher.hidden),
        jax.lax.stop_gradient(unembedding(teacher.params, teacher.model)),
        teacher.divergence,
        teacher.temperature,
    )
    targets = log_probs_of_wanted(
        params, output.hidden, rows, wanted, model, temperature=temperature, teacher=read
    )
    assert targets.comparison is not None
    return DistilledLogProbs(
        targets.log_probs, targets.entropy, targets.comparison, output.routings
    )
