import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker: two that spin on two cores crawl
    os.environ["OMP_NUM_THREADS"] = "1"
