"""One inference request, from admission to settlement."""
