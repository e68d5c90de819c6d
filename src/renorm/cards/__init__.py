"""A card for each norm: what it computes and costs, where it is strong and weak, and who says so."""

from renorm.cards.card import Card
from renorm.cards.read import contents, explain, names

__all__ = ["Card", "contents", "explain", "names"]
