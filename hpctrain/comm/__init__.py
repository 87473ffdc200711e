"""Bytes between ranks. Knows nothing of gradients.

Importing mpi4py.MPI initialises MPI unless told otherwise; `hpctrain.join` does that itself, after
it has checked the launcher.
"""

from hpctrain.world import load_mpi

load_mpi()
