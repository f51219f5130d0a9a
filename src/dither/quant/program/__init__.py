"""A model's step for one token as a program of C++ kernels: recorded from the model as it runs, proved against it, and run without torch."""
