"""Literal tables of the zoo, one per source. No torch here: listing the zoo is quick."""
