"What a step of RL costs: TRL's trainer as it is, without the work that teaches nothing, and with each prompt read once, from the same IN on the same prompts; and that all end in the same weights."
import tempfile
import time
from pathlib import Path

import torch

from franken import packing, reinforcement
from franken.practice import Practice
from franken.trio import Checkpoint, load_trio

STEPS = 20


def run(out: Path) -> tuple[float, Checkpoint]:
    "(seconds a step, the model) of a short run, without its first step."
    times = []

    class Clock(reinforcement.Watch):
        def on_step_end(self, args, state, control, **kwargs): times.append(time.perf_counter())
    watch, reinforcement.Watch = reinforcement.Watch, Clock
    try: folder = reinforcement.reinforce(load_trio("organism").in_.folder, out, Practice(steps=STEPS, warmup=2), seed=0)
    finally: reinforcement.Watch = watch
    return (times[-1] - times[0]) / (STEPS - 1), Checkpoint(str(folder))


def main():
    torch.set_num_threads(1)
    start = load_trio("organism").in_
    apart = lambda one, other: max(float((one.tensor(n) - other.tensor(n)).abs().max()) for n in one.names())
    with tempfile.TemporaryDirectory() as scratch:
        found = {"with each prompt read once": run(Path(scratch) / "once")}
        found["without groups of equal rewards"] = without(packing.PromptOnce, "_get_per_token_logps_and_entropies", lambda: run(Path(scratch) / "lean"))
        plain = lambda: without(reinforcement.GroupTrainer, "_compute_loss", lambda: run(Path(scratch) / "plain"))
        found["TRL"] = without(packing.PromptOnce, "_get_per_token_logps_and_entropies", plain)
        slow, theirs = found["TRL"]
        moved = apart(theirs, start)
        print("GRPO, 24 prompts x 8 answers, one thread, seconds a step:", ", ".join(f"{name} {seconds:.2f} ({seconds / slow:.0%})" for name, (seconds, _) in reversed(found.items())))
        for name, (_, mine) in found.items():
            print(f"{name}: largest difference of a weight from TRL's after {STEPS} steps {apart(mine, theirs):.1e}, of {moved:.1e} that it moved")
            assert apart(mine, theirs) < 1e-2 * moved


def without(owner, name: str, do):
    "What `do` returns while a class does not have a method of its own."
    method = getattr(owner, name)
    delattr(owner, name)
    try: return do()
    finally: setattr(owner, name, method)


if __name__ == "__main__": main()
