"""The joint forward-backward graph, brought into one normal form.

AOTAutograd traces forward and backward into one functional ``torch.fx`` graph of ATen operators. Three things are
changed before anyone looks at it, so that no schedule needs more memory than eager, and a fourth so that its numbers
are eager's (:mod:`~graph_capture.autocast`):

- a ``clone`` that changes nothing (same strides, no conjugation that it carries out) disappears: the graph is
  functional, nobody can see the difference;
- dead operators disappear, but for random ones, which advance the generator, and checks, which may raise;
- writes into buffers (``copy_``), which stand at the very end, move to the first place where nobody reads the old
  contents any more, so that the new contents need not wait for the end of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput
from torch.utils._pytree import tree_leaves

from graph_capture.autocast import share_casts
from graph_capture.effects import is_effect, refuse_tokens
from graph_capture.errors import CaptureError
from graph_capture.pooling import release_pooled_inputs

aten = torch.ops.aten
UNCERTAIN_LAYOUT = "uncertain_layout"


@dataclass(frozen=True)
class Joint:
    """A normalised joint graph.

    **Fields:**

    - `primals`: inputs of the forward, `tangents`: of the backward.
    - `forward_outputs`, `gradients`: nodes or `None`; one gradient for each primal.
    - `output_descriptions`: AOTAutograd's descriptions of all outputs, forward ones first.
    """

    module: fx.GraphModule
    primals: tuple[fx.Node, ...]
    tangents: tuple[fx.Node, ...]
    forward_outputs: tuple[Any, ...]
    gradients: tuple[Any, ...]
    output_descriptions: tuple[Any, ...]


def normalise(module: fx.GraphModule, num_forward_outputs: int) -> Joint:
    """Bring AOTAutograd's joint graph into the normal form of this module, in place."""
    graph = module.graph
    refuse_tokens(graph)
    _refuse_sparse(graph)
    _separate_tangents(graph)
    _show_views(graph, num_forward_outputs)
    share_casts(graph)
    drop_unused_statistics(graph)
    release_pooled_inputs(graph)
    _drop_clones(graph)
    graph.eliminate_dead_code(is_impure_node=_must_stay)
    _advance_writes(graph)
    _allow_for_uncertain_layouts(graph)
    _make_gradients(graph, num_forward_outputs)
    graph.lint()
    output = next(iter(graph.find_nodes(op="output")))
    outputs = tuple(output.args[0])
    placeholders = graph.find_nodes(op="placeholder")
    tangents = tuple(n for n in placeholders if n.name.startswith("tangents"))
    primals = tuple(n for n in placeholders if not n.name.startswith("tangents"))
    return Joint(
        module=module,
        primals=primals,
        tangents=tangents,
        forward_outputs=outputs[:num_forward_outputs],
        gradients=outputs[num_forward_outputs:],
        output_descriptions=tuple(output.meta.get("desc", (None,) * len(outputs))),
    )


def tangent_descriptions(joint: Joint) -> tuple[Any, ...]:
    """For each tangent AOTAutograd's description of the forward output whose gradient it is."""
    return tuple(tangent.meta["desc"].output for tangent in joint.tangents)


def tangent_positions(joint: Joint) -> tuple[int, ...]:
    """For each tangent the position among all forward outputs of the one whose gradient it is.

    An input that the forward writes to is a forward output, too, and stands before those that the model returns.
    """
    outputs = joint.output_descriptions[: len(joint.forward_outputs)]
    return tuple(outputs.index(description) for description in tangent_descriptions(joint))


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The fake tensors that a node returns."""
    return [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of a (fake) tensor's storage."""
    return tensor.untyped_storage()._cdata


def lazy_bits(tensor: torch.Tensor) -> tuple[bool, bool]:
    """Whether a tensor is a view that stands for the conjugate, or the negative, of what lies in its storage."""
    return tensor.is_conj(), tensor.is_neg()


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers. Attention kernels do so only with a dropout probability."""
    if not (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags):
        return False
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(given != 0.0)
    return True


def is_mutation(node: fx.Node) -> bool:
    """Whether a node writes into one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def written_storages(graph: fx.Graph) -> set[int]:
    """Storages that the step writes to: by operators of the graph, or by AOTAutograd once the forward has ended.

    The latter are inputs whose new contents carry a gradient: these are forward outputs.
    """
    output = next(iter(graph.find_nodes(op="output")))
    described = output.meta.get("desc", ())
    inputs = {d.mutated_input for d in described if isinstance(d, InputMutationAOTOutput)}
    targets = [p for p in graph.find_nodes(op="placeholder") if p.meta.get("desc") in inputs]
    targets += [n.all_input_nodes[0] for n in graph.nodes if n.op == "call_function" and is_mutation(n)]
    return {storage_key(tensors_of(target)[0]) for target in targets}


def _must_stay(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or is_mutation(node) or is_random(node) or is_effect(node)


def drop_unused_statistics(graph: fx.Graph) -> None:
    """In training, the backward of batch normalisation takes the running statistics and does not read them.

    Saved for the backward, they would make a second forward before it an error: it updates them in place.
    """
    for node in graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default):
        if node.args[7]:
            node.args = (*node.args[:3], None, None, *node.args[5:])


def _refuse_sparse(graph: fx.Graph) -> None:
    for node in graph.nodes:
        for tensor in tensors_of(node):
            if tensor.layout != torch.strided:
                raise CaptureError(
                    f"{node.target} makes a tensor of layout {tensor.layout}, whose memory a plan does not know. Use "
                    "dense tensors; of an embedding with sparse=True, sparse=False."
                )


def _separate_tangents(graph: fx.Graph) -> None:
    """Give every tangent a storage of its own.

    AOTAutograd records a tangent as an alias of its output: those of two outputs that are views of one tensor, or of
    an input, share a storage that their gradients will not share.
    """
    placeholders = graph.find_nodes(op="placeholder")
    count = Counter(storage_key(t) for p in placeholders for t in tensors_of(p))
    for tangent in placeholders:
        if tangent.name.startswith("tangents") and count[key := storage_key(tangent.meta["val"])] > 1:
            recorded = tangent.meta["val"]
            tangent.meta["val"] = recorded.new_empty_strided(recorded.shape, recorded.stride())
            _run_views_again(tangent.users, key)


def _show_views(graph: fx.Graph, num_forward_outputs: int) -> None:
    """Outputs that share their memory are views again, so that autograd refuses to write into one of them in place.

    For the trace they were not (:mod:`~graph_capture.prepare`): it would not know of the others.
    """
    outputs = next(iter(graph.find_nodes(op="output"))).args[0][:num_forward_outputs]
    nodes = dict.fromkeys((*graph.find_nodes(op="placeholder"), *(o for o in outputs if isinstance(o, fx.Node))))
    count = Counter(key for node in nodes for key in {storage_key(t) for t in tensors_of(node)})
    for node in outputs:
        if isinstance(node, fx.Node) and node.target is aten._unsafe_view.default:
            same = node.meta["val"].shape == node.all_input_nodes[0].meta["val"].shape
            if same and count[storage_key(node.meta["val"])] > 1:
                node.target, node.args = aten.alias.default, node.args[:1]


def _drop_clones(graph: fx.Graph) -> None:
    output = next(iter(graph.find_nodes(op="output")))
    returned = set(output.all_input_nodes)
    written = written_storages(graph)
    for node in list(graph.nodes):
        if node.target is not aten.clone.default or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        before, after = tensors_of(source), tensors_of(node)
        same = len(before) == len(after) == 1 and before[0].stride() == after[0].stride()
        same = same and lazy_bits(before[0]) == lazy_bits(after[0])
        # What is returned must keep a storage of its own: an output that aliases an input or another output behaves
        # differently for the caller. And a copy of what is overwritten later holds the old contents.
        if same and not _reaches(node, returned) and storage_key(before[0]) not in written:
            users = list(node.users)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            _run_views_again(users, storage_key(after[0]))


def _run_views_again(users: Iterable[fx.Node], key: int) -> None:
    """Renew what is recorded of those of `users` that were views of the storage `key`, and of their views."""
    stale = list(users)
    while stale:
        view = stale.pop()
        if any(storage_key(t) == key for t in tensors_of(view)):
            args, kwargs = fx.map_arg((view.args, dict(view.kwargs)), lambda n: n.meta["val"])
            view.meta["val"] = view.target(*args, **kwargs)  # type: ignore[operator]
            stale += view.users


def _reaches(node: fx.Node, returned: set[fx.Node]) -> bool:
    """Whether a returned tensor shares the node's storage."""
    key = storage_key(tensors_of(node)[0])
    return any(storage_key(t) == key for r in returned for t in tensors_of(r))


def _advance_writes(graph: fx.Graph) -> None:
    position = {node: index for index, node in enumerate(graph.nodes)}
    writes = list(graph.find_nodes(op="call_function", target=aten.copy_.default))
    readers = _readers(graph) if writes else {}
    for write in writes:
        target, source = write.args[0], write.args[1]
        if not isinstance(target, fx.Node) or target.op != "placeholder" or not isinstance(source, fx.Node):
            continue
        key = storage_key(tensors_of(target)[0])
        others = [n for n in readers.get(key, ()) if n is not write]
        anchor = max([source, *others], key=lambda n: position.get(n, -1))
        if anchor.op == "call_function" and not write.users and anchor.meta.get("partitioner_tag") != "is_backward":
            anchor.append(write)


def _make_gradients(graph: fx.Graph, num_forward_outputs: int) -> None:
    """Let an operator of the backward make every gradient: copy those that are views of what was there before it.

    So are that of a sum, the expanded tangent, and that of a parameter that is only added, the tangent itself. Autograd
    would copy the first kind at once, and takes over the second.
    """
    output = next(iter(graph.find_nodes(op="output")))
    placeholders = graph.find_nodes(op="placeholder")
    tangents = {n for n in placeholders if n.name.startswith("tangents")}
    late: set[fx.Node] = set(tangents)
    for node in graph.nodes:
        if node.meta.get("partitioner_tag") == "is_backward" or any(i in late for i in node.all_input_nodes):
            late.add(node)
    before = {storage_key(t) for n in graph.nodes if n in tangents or n not in late for t in tensors_of(n)}
    copies: dict[fx.Node, fx.Node] = {}
    for gradient in dict.fromkeys(output.args[0][num_forward_outputs:]):
        if isinstance(gradient, fx.Node) and storage_key(tensors_of(gradient)[0]) in before:
            with graph.inserting_after(gradient if gradient.op == "call_function" else placeholders[-1]):
                copies[gradient] = graph.call_function(aten.clone.default, (gradient,))
            recorded = tensors_of(gradient)[0]
            copies[gradient].meta = {**gradient.meta, "val": aten.clone.default(recorded)}
            copies[gradient].meta["partitioner_tag"] = "is_backward"
    outputs = output.args[0]
    replaced = [copies.get(o, o) if isinstance(o, fx.Node) else o for o in outputs[num_forward_outputs:]]
    output.args = ((*outputs[:num_forward_outputs], *replaced),)


def _readers(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """For each storage the operators that read it."""
    keys = {node: {storage_key(t) for t in tensors_of(node)} for node in graph.nodes}
    found: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for key in set().union(*(keys[i] for i in node.all_input_nodes)):
                found.setdefault(key, []).append(node)
    return found


def _allow_for_uncertain_layouts(graph: fx.Graph) -> None:
    """Mark nodes whose recorded strides may not be those of the kernel, and let their views copy where they must.

    Batch normalisation of an input that is neither contiguous nor channels-last is recorded with the input's strides,
    but the CPU kernel returns a contiguous result. What is computed from it may inherit either.
    """
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        uncertain = any(n.meta.get(UNCERTAIN_LAYOUT, False) for n in node.all_input_nodes)
        if "_native_batch_norm_legit" in str(node.target):
            normalised = tensors_of(node.all_input_nodes[0])[0]
            uncertain = not any(normalised.is_contiguous(memory_format=f) for f in _formats(normalised.dim()))
        node.meta[UNCERTAIN_LAYOUT] = uncertain
        if uncertain and node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        if uncertain and node.target is aten.as_strided.default:
            raise CaptureError(
                "as_strided is applied to a result of batch normalisation whose layout is not known; make the input of "
                "the normalisation contiguous"
            )


def _formats(dimensions: int) -> tuple[torch.memory_format, ...]:
    known = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}
    return (torch.contiguous_format, *known.get(dimensions, ()))


def partitioner(sink: Callable[[Joint], tuple[fx.GraphModule, fx.GraphModule]]) -> Callable[..., Any]:
    """An AOTAutograd `partition_fn` that normalises the joint graph and hands it to `sink`."""

    def partition(module: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        return sink(normalise(module, num_fwd_outputs))

    return partition
