"""Checkpoints: all state of a run, complete or not there at all.

A checkpoint is a folder (`format`, `manifest`). The training loop begins one and waits for its end
(`saver`); it is written under another name while training goes on (`writer`, from copies that
`copies` makes), and made visible by one rename (`store`). Reading starts at the newest and goes
back until every file of one matches its manifest, on all ranks (`loading`).
"""
