"""What lies in memory for the forward pass alone, and is computed in passing by the backward pass.

A max pooling is called with the result of a ReLU, which is therefore written; in the backward pass only the ReLU's own
gradient reads it, in a generated kernel. That kernel can read in its place what the ReLU is computed from, and where
the backward pass reads that anyway, the result need not stay. So such a reader gets a twin of the node, which
:mod:`~graph_capture.fusion` then inlines.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from graph_capture.fusible import consumers, is_generated, views
from graph_capture.fusion import Finder


def read_again_in_passing(forward: Sequence[fx.Node], backward: Sequence[fx.Node], written: Collection[int]) -> bool:
    """Give twins to what the backward pass can compute in passing, in place; whether there was any.

    `forward`, `backward`: nodes in captured order. `written`: storages that the step writes into.
    """
    generated = frozenset(n for n in (*forward, *backward) if is_generated(n))
    finder = Finder(generated, written)
    finder.inline_alike(forward)
    late = frozenset(backward)
    readers: dict[int, set[fx.Node]] = {}
    for node in backward:
        for storage in finder.storages_read(node):
            readers.setdefault(storage, set()).add(node)
    found = False
    for node in forward:
        again = [reader for reader in consumers(node) if reader in late]
        if not again or node in finder.lengths or not generated.issuperset(again) or not finder.is_cheap(node):
            continue
        (source,) = finder.alike_storages(node)
        if readers.get(source, set()).difference(again):
            _give_twin(node, again)
            found = True
    return found


def _give_twin(node: fx.Node, readers: Collection[fx.Node]) -> None:
    """Let `readers` read a twin of `node`, through twins of the views that they read it through."""
    recorded = node.meta["val"]
    with node.graph.inserting_after(node):
        twin = node.graph.node_copy(node)
    twin.meta = {**node.meta, "val": recorded.new_empty_strided(recorded.shape, recorded.stride())}
    twins = {node: twin}
    for view in views(node):
        if not set(consumers(view)).intersection(readers):
            continue
        (source,) = (i for i in view.all_input_nodes if i in twins)
        with node.graph.inserting_after(twins[source]):
            copied = node.graph.node_copy(view, lambda n: twins.get(n, n))
        args, kwargs = fx.map_arg((copied.args, dict(copied.kwargs)), lambda n: n.meta["val"])
        copied.meta = {**view.meta, "val": view.target(*args, **kwargs)}  # type: ignore[operator]
        twins[view] = copied
    for reader in readers:
        for known in [i for i in reader.all_input_nodes if i in twins]:
            reader.replace_input_with(known, twins[known])
