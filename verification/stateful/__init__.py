"""Any order of what a user may do with an optimizer, against Algorithm 1 kept by hand."""
