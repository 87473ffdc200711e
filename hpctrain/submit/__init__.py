"""From a job file to a job in Slurm's queue.

`config` is the `[submit]` table, `launcher` finds out how ranks are started on this cluster, and
`script` renders the batch script, a pure function of these. All of it runs on the login node,
without MPI.
"""
