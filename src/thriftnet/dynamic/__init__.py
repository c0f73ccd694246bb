"""Networks that choose their width for each image: gates, splitting a network in two, running it, and searching widths."""
