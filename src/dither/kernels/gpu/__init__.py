"""The hot loops on a GPU, in Triton, which is imported when a kernel is first called and not before. `ops` has them as operations of torch."""
