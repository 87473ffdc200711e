"""Plans from measured facts: pure arithmetic, without MPI and without torch."""
