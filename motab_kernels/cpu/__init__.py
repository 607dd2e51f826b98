"""C++ kernels, one file an op. `library` loads what setup.py built."""
