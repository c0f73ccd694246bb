"""The ground: layers with computed weights, ties and widths, and the verbs that work on them. Imports torch only."""
