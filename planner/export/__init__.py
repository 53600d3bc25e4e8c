"""A plan in the form of `torch.utils.checkpoint`: for those who keep PyTorch's own checkpointing, or torchtitan's.

What that form can say is less than what a schedule can: a block is left alone, or it runs again as a whole at its own
backward, but for the operators that its policy saves. The best such policy within the budget is chosen, and what it
costs beside the plan is part of the result.
"""
