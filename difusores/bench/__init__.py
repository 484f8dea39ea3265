"""`python -m difusores bench gpu`: every kernel on a GPU, checked, then timed beside its peers."""
