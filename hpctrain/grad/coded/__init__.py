"""Coded redundancy of data blocks: whoever is slow or dead, every step has the exact gradient.

The way of a data block: `exchange` (`Coded.step`) takes its number from `worker` and has the
program compute it. `backward` puts the gradient of each model block (`columns`) into a cell
(`cells`) as soon as it is there; `worker` adds up what it has along a tree (`sums`) and sends it.
At a root, `desk` hands messages to whom they are for: cells to `aggregator`, which adds up what all
sent and sends the results to all, and words to `coordinator`, which decides who computes what
(`dealing`) among those who hold it (`assignment`), knows who lives, and has ranks that fell behind
given a state (`catching_up`). On one node, cells and results are lent instead (`lending`).

`schemes` says what workers send: partial sums, one coded vector (`mds`), or copies to vote on; what
adds up then is in `collecting`. `record` writes the trace. Only `exchange` touches MPI, by way of a
mailbox: the rest is driven by messages and a clock, and tested so (tests/grad/coded/test_network).
"""
