"One thread a process: the models are tiny, and pytest-xdist runs several processes."
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a hub
os.environ.setdefault("TQDM_DISABLE", "1")
