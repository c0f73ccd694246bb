"""Networks that choose their width for each image: the gate, the split into front and tails, running, training and searching.

`gate` and `add_gate` put a gate into a slimmable network, `split` divides a network in two, `network` runs it, `micro_batch` runs
large batches in parts, `objective` has the losses of a gate, and `search` finds widths without a gate.
"""
