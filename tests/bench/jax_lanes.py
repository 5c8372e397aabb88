"""The digits MLP in lanes by JAX: jit(vmap(scan)) of whole trials. A program of its own, which `steady.py` runs.

    python jax_lanes.py --width 64 --lanes 32 [--steps 200] [--repeats 3] [--core 0]

Prints `ready` once compiled; then for each line on stdin, trains all lanes once and prints the seconds it took.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

CLIP, MOMENTUM, BATCH = 1.0, 0.9, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 64), ("lanes", 32), ("steps", 200), ("core", -1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.core >= 0:  # before JAX makes a thread for each core that it sees
        os.sched_setaffinity(0, {args.core})
    serve(args.width, args.lanes, args.steps)


def serve(width: int, lanes: int, steps: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

    def loss_of(params, rows):
        hidden = images[rows]
        for weight, bias in params[:-1]:
            hidden = jax.nn.relu(hidden @ weight + bias)
        logits = hidden @ params[-1][0] + params[-1][1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[rows][:, None], axis=1)
        return -chosen.mean()

    def trial(rate, params, index):
        def step(state, rows):
            params, buffers = state
            loss, gradient = jax.value_and_grad(loss_of)(params, rows)
            norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
            share = jnp.minimum(1.0, CLIP / (norm + 1e-6))
            buffers = jax.tree.map(lambda b, g: MOMENTUM * b + share * g, buffers, gradient)
            params = jax.tree.map(lambda p, b: p - rate * b, params, buffers)
            return (params, buffers), (loss, norm)

        return jax.lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), index)[1]

    draw = np.random.default_rng(0)
    sizes = [(64, width), (width, width), (width, 10)]
    bounds = [n**-0.5 for n, _ in sizes]
    params = [
        (draw.uniform(-b, b, (lanes, *s)).astype("f"), draw.uniform(-b, b, (lanes, s[1])).astype("f"))
        for b, s in zip(bounds, sizes, strict=True)
    ]
    index = draw.integers(0, len(images), (lanes, steps, BATCH))
    given = jax.device_put((np.geomspace(1e-3, 0.1, lanes).astype("f"), params, index))
    train = jax.jit(jax.vmap(trial))
    losses, _ = jax.block_until_ready(train(*given))
    assert bool(jnp.isfinite(losses).all())
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        jax.block_until_ready(train(*given))
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
