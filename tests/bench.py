"What an intervention and an image cost, here: `make bench`. Times are the fastest of several, since a machine only ever adds to them."
import os
import platform
import time

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import transformers

from franken import scenes
from franken.interventions import prepare_swap, skipped_forward, skipped_generate, swapped_forward, swapped_generate
from franken.organism import build_model, build_processor, patches
from franken.vlm import Prompt, Vlm

PAIRS, TOKENS, TIMES = 64, 16, 5


def milliseconds(run, times=TIMES):
    "The fastest of `times` runs, after one that does not count."
    def once():
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    run()
    return min(once() for _ in range(times))


def table(title, costs: dict):
    "Print the costs, each beside what it is of the first."
    first = next(iter(costs.values()))
    print(f"\n{title}")
    for what, cost in costs.items(): print(f"  {what:60}{cost:10.2f} ms{cost / first:9.2f} x")


@torch.no_grad()
def interventions(vlm: Vlm):
    "A forward pass and a generation: plain, traced, swapped, skipped."
    pairs = scenes.pairs("counting", PAIRS, seed=0)
    prompts = [[Prompt(p.question.text, scenes.image(scene)) for p, scene in zip(pairs, side)] for side in ([p.question.scene for p in pairs], [p.source for p in pairs])]
    batch, states = prepare_swap(vlm, *prompts)
    layer, size = vlm.n_layers // 2, dict(min_new_tokens=TOKENS)
    _, own = prepare_swap(vlm, prompts[0], prompts[0])

    def traced():
        with vlm.traced.trace(**batch):  # nnsight wants the body on a line of its own
            vlm.traced.output.logits.save()

    table(f"Forward pass, {PAIRS} images with a question, {vlm.n_layers} layers", {
        "plain": milliseconds(lambda: vlm.model(**batch)),
        "traced by nnsight, nothing changed": milliseconds(traced),
        "swap with itself": milliseconds(lambda: swapped_forward(vlm, batch, own(layer))),
        "swap": milliseconds(lambda: swapped_forward(vlm, batch, states(layer))),
        "skip one layer": milliseconds(lambda: skipped_forward(vlm, batch, [layer]))})
    table(f"Generation, {TOKENS} tokens each", {
        "plain": milliseconds(lambda: vlm.model.generate(**batch, **vlm.settings(TOKENS), **size)),
        "swap with itself": milliseconds(lambda: swapped_generate(vlm, batch, own(layer), TOKENS, **size)),
        "swap": milliseconds(lambda: swapped_generate(vlm, batch, states(layer), TOKENS, **size)),
        "skip one layer": milliseconds(lambda: skipped_generate(vlm, batch, [layer], TOKENS, **size))})


def images(processor):
    "From pictures to patches: transformers' processor, and ours for batches of one size."
    pictures = [scenes.pixels(p.source) for p in scenes.pairs("counting", PAIRS, seed=0)]
    stack = np.stack(pictures)
    table(f"{PAIRS} images to patches", {
        "the processor": milliseconds(lambda: processor.image_processor(pictures, return_tensors="pt")),
        "patches()": milliseconds(lambda: patches(stack))})


if __name__ == "__main__":
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} thread(s)")
    processor = build_processor()
    interventions(Vlm(build_model(layers=6), processor, "organism of random weights"))
    images(processor)
