"""Six subjects in two toy languages: what the whole recipe needs, small enough for a laptop."""

from r1jax.data.tasks.bilingual.conversation import harmless as harmless
from r1jax.data.tasks.bilingual.conversation import helpful as helpful
from r1jax.data.tasks.bilingual.task import LANGUAGES as LANGUAGES
from r1jax.data.tasks.bilingual.task import REPLACEMENTS as REPLACEMENTS
from r1jax.data.tasks.bilingual.task import Bilingual as Bilingual
