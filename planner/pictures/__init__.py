"""Pictures of plans: memory over the step, overhead against memory, and the graph coloured by decision.

What is drawn is plain data first (:mod:`timeline`, :mod:`lanes`, :mod:`points`, :mod:`blocks`). Two things draw it: SVG
of our own for pages and documents, and matplotlib, imported only when a plot is asked for.
"""
