"What a step of RL costs: TRL's trainer as it is, and without the work that teaches nothing, from the same IN on the same prompts; and that both end in the same weights."
import tempfile
import time
from pathlib import Path

import torch

from franken import reinforcement
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
    lean = reinforcement.GroupTrainer._compute_loss
    with tempfile.TemporaryDirectory() as scratch:
        fast, mine = run(Path(scratch) / "lean")
        del reinforcement.GroupTrainer._compute_loss
        try: slow, theirs = run(Path(scratch) / "plain")
        finally: reinforcement.GroupTrainer._compute_loss = lean
        start = load_trio("organism").in_
        apart, moved = (max(float((a.tensor(n) - b.tensor(n)).abs().max()) for n in a.names()) for a, b in ((mine, theirs), (mine, start)))
    print(f"GRPO, 24 prompts x 8 answers, one thread: TRL {slow:.2f} s a step, without groups of equal rewards and in parts of like length {fast:.2f} s ({fast / slow:.0%})")
    print(f"largest difference of a weight after {STEPS} steps {apart:.1e}, of {moved:.1e} that it moved")
    assert apart < 1e-2 * moved


if __name__ == "__main__": main()
