import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_SILENT", "true")
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker: two that spin on two cores crawl
    os.environ["OMP_NUM_THREADS"] = "1"

MACHINERY = {"slurm": "needs a real SLURM, as root", "ray": "starts a Ray cluster on this machine"}


def pytest_configure(config):
    for name, what in MACHINERY.items():
        config.addinivalue_line("markers", f"{name}: {what}; deselected unless asked for by -m")
    config.addinivalue_line("markers", "meaning(kind): a whole input that means something else")


def pytest_collection_modifyitems(config, items):
    unwanted = [name for name in MACHINERY if name not in config.option.markexpr]
    left_out = [item for item in items if any(map(item.get_closest_marker, unwanted))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
