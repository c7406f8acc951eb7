"""Six subjects in two toy languages: what the whole recipe needs, small enough for a laptop."""

from r1jax.data.tasks.bilingual.conversation import harmless, helpful
from r1jax.data.tasks.bilingual.task import LANGUAGES, REPLACEMENTS, Bilingual

__all__ = ["LANGUAGES", "REPLACEMENTS", "Bilingual", "harmless", "helpful"]
