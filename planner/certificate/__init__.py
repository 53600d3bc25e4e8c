"""Certificates: what a plan claims, with what proves it, and a verifier that trusts nobody.

A certificate is a JSON file with the graph, the budget, the schedule, and a proof of a lower bound on the overhead.
:mod:`~planner.certificate.verify` checks it in exact arithmetic with the standard library and :class:`Graph` alone:
no solver, no simulator, no numerical library. Its parts:

- :mod:`~planner.certificate.statement`: the file's form;
- :mod:`~planner.certificate.replay`: cost and peak of the schedule, a second interpreter beside the simulator;
- :mod:`~planner.certificate.relaxation`: the inequalities that every schedule satisfies, with their proof;
- :mod:`~planner.certificate.cuts`: what follows from them because a schedule's decisions are whole numbers;
- :mod:`~planner.certificate.duality`: the bound that a combination of them proves.

The makers, :mod:`~planner.certificate.make` and what it imports, need OR-Tools; nothing that they say is believed.
"""
