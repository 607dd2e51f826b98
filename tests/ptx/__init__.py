"""A GPU in numpy: it runs the PTX that Triton compiles, so that compiled kernels are tested where there is no GPU.

`driver.py` is a driver for Triton, which binds, specialises and compiles a launch as on a GPU; `text.py` reads the
PTX, `arithmetic.py` and `instructions.py` say what it does, `memory.py` what may be touched, `machine.py` runs it.
Threads go in lockstep, the programs of a launch in an order of chance.

What Triton's interpreter cannot show is shown here: specialisation by divisibility, the layouts and shuffles of
reductions, shared memory, approximate functions, how NaN and subnormals come through, tensors that share memory. And
what on a GPU is an error, or luck, is an error: an access outside of the launch's tensors or not aligned to its
width, a register that is read before it is written, a copy that was not waited for, a race between programs or between
the warps of one.
"""
