"""The operations compiled for a CPU. Importing from here needs Numba, the extra `[cpu]`."""
