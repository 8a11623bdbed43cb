"""How one tensor is computed: lazy tensors, the memory budget, and the worker that computes."""
