"""Columns that are applied late: delayed gradients, local updates, and what joins the two.

A *period* has K iterations. In each, a rank takes a step of its own, on its own gradient. Once a
period, every parameter is exchanged: what it has to tell is *captured* after iteration f, *pushed*
some iterations later, and the mean over ranks *pulled* some iterations after f, when the parameters
take it in (`merging`). Parts of the model, *fragments*, have their turns one after another, so that
the wire has something to do in every iteration (`schedule`). What is on the wire meanwhile costs
no rank any time.

What is told is either the gradient of one iteration, or the change of the parameters in a period.
Published methods are points in this space (`method.PRESETS`).
"""
