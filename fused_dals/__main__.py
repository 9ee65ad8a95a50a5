"""``python -m fused_dals``: build the compiled walk ahead of time, as for an image that has no compiler later."""

from fused_dals.host_walk import HOST_WALK

if HOST_WALK.want(wait=True) is None:
    raise SystemExit(f"error: no compiled walk: {HOST_WALK.why_not}. Optimizers work without it.")
print("The compiled walk over tensors is there. Optimizers on a GPU will use it.")
