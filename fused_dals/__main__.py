"""``python -m fused_dals``: build the compiled walk ahead of time, as for an image that has no compiler later."""

from fused_dals.host_walk import HOST_WALK

WHAT_IT_IS = (
    "The compiled walk is a piece of C++ that looks, before every fused step on a GPU, for what changed since the last "
    "one. Python does the same where it is missing: same results, a little more host time a step, nothing else."
)

if HOST_WALK.want(wait=True) is None:
    raise SystemExit(f"{WHAT_IT_IS}\nIt could not be built here: {HOST_WALK.why_not}.")
print(f"{WHAT_IT_IS}\nIt is built, and optimizers on a GPU will use it.")
